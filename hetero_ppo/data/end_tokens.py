"""Token ids that end a sequence, from the tokenizer, the model's config.json and its generation_config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

#: Files of a model folder whose ``eos_token_id`` is one id or a list of them.
EOS_FILES = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class EndToken:
    """One token that ends a sequence."""

    token_id: int
    token: str | None  # None: the tokenizer has no token of this id
    sources: tuple[str, ...]  # "tokenizer" and names of files

    def __str__(self) -> str:
        name = "a token that the tokenizer does not have" if self.token is None else repr(self.token)
        return f"{name} = {self.token_id} ({', '.join(self.sources)})"


def find_end_tokens(tokenizer: PreTrainedTokenizerBase, model_folder: str) -> tuple[EndToken, ...]:
    """Return the end tokens of all three sources, the tokenizer's own first.

    Raises:
        ValueError: An ``eos_token_id`` is neither an id nor a list of ids.
    """
    sources: dict[int, list[str]] = {tokenizer.eos_token_id: ["tokenizer"]}
    for name in EOS_FILES:
        for token_id in _eos_ids(Path(model_folder) / name):
            sources.setdefault(token_id, []).append(name)
    tokens = {token_id: token for token, token_id in tokenizer.get_vocab().items() if token_id in sources}
    return tuple(EndToken(token_id, tokens.get(token_id), tuple(names)) for token_id, names in sources.items())


def read_json_file(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model folder; {} if there is no such file.

    Raises:
        ValueError: The file is not a JSON object.
    """
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(values).__name__}")
    return values


def _eos_ids(file: Path) -> list[int]:
    value = read_json_file(file).get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise ValueError(f"{file}: eos_token_id is {value!r}; it has to be a token id or a list of them")
    return ids

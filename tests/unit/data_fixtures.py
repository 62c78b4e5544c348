"""A small ChatML tokenizer and files of rows, for the tests of data and command line."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedTokenizerFast

from hetero_ppo.config.schema import DataConfig
from hetero_ppo.data.chat_template import TextEncoder
from hetero_ppo.data.tokenizer_training import CHATML_TEMPLATE, train_tokenizer

TEXTS = ["user assistant system", "sort these words: apple pear plum", "the answer is apple pear plum.", "hello there"]


@cache
def chatml_tokenizer() -> PreTrainedTokenizerFast:
    with TemporaryDirectory() as folder:
        return train_tokenizer(TEXTS * 3, 320, Path(folder))


def chatml_encoder(template: str | None = CHATML_TEMPLATE) -> TextEncoder:
    """``template`` None: plain text."""
    tokenizer = chatml_tokenizer()
    return TextEncoder(tokenizer, template, [], tokenizer.eos_token_id, "tokenizer")


def data_config(**changes: object) -> DataConfig:
    return DataConfig(train="unused.jsonl", **changes)


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)

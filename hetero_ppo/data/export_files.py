"""Files of an export that let others use the model as the run did: its chat template, and the tokens that end and pad a sequence."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hetero_ppo.data.chat_template import TextEncoder
from hetero_ppo.data.end_tokens import read_json_file

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class ExportFiles:
    """Additions to an exported Hugging Face folder."""

    files: dict[str, str] = field(default_factory=dict)  # name -> text; they replace the files of the source folder
    config: dict[str, Any] = field(default_factory=dict)  # entries of config.json


def export_files(encoder: TextEncoder, model_folder: str, head: str) -> ExportFiles:
    """Return the files and config entries that are exported with the weights of a role.

    Args:
        encoder: Tokenizer and template of the run.
        model_folder: Folder that the role was loaded from.
        head: "lm", "value" or "score".

    Raises:
        ValueError: A JSON file of the model or tokenizer folder is damaged.
    """
    files = _template_files(encoder)
    tokenizer, ends = encoder.tokenizer, encoder.end_token_ids
    if head != "lm":
        # transformers reads a classifier's output at the last token that is not padding. If padding is also an end token, that would be
        # the token before the end. Without a padding token transformers takes one sequence at a time and reads its last token.
        pad = tokenizer.pad_token_id
        return ExportFiles(files, {"pad_token_id": None if pad in ends else pad})
    generation = read_json_file(Path(model_folder) / GENERATION_CONFIG)
    generation["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if generation.get("pad_token_id") is None:
        generation["pad_token_id"] = encoder.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if generation.get("bos_token_id") is None and tokenizer.bos_token_id is not None:
        generation["bos_token_id"] = tokenizer.bos_token_id
    files[GENERATION_CONFIG] = json.dumps(generation, indent=2) + "\n"
    return ExportFiles(files)


def _template_files(encoder: TextEncoder) -> dict[str, str]:
    """Return the run's template as a replacement of the tokenizer's; {} if they are the same."""
    if encoder.template is None or encoder.template == encoder.tokenizer.chat_template:
        return {}
    files = {TEMPLATE_FILE: encoder.template}
    config = read_json_file(Path(encoder.source) / TOKENIZER_CONFIG)
    if config.pop("chat_template", None) is not None:
        files[TOKENIZER_CONFIG] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return files

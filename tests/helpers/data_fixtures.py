"""A small ChatML tokenizer and files of rows, for the tests of data and command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerFast

from hetero_ppo.config.schema import DataConfig, PreferenceDataConfig, PromptDataConfig, SftDataConfig
from hetero_ppo.data.chat_template import TextEncoder
from hetero_ppo.data.preference import load_preferences
from hetero_ppo.data.prompts import load_prompts
from hetero_ppo.data.sft import load_sft
from hetero_ppo.data.tokenizer_training import CHATML_TEMPLATE, train_tokenizer

TEXTS = ["user assistant system", "sort these words: apple pear plum", "the answer is apple pear plum.", "hello there"]


@cache
def chatml_tokenizer() -> PreTrainedTokenizerFast:
    with TemporaryDirectory() as folder:
        return train_tokenizer(TEXTS * 3, 320, Path(folder))


def chatml_encoder(template: str | None = CHATML_TEMPLATE) -> TextEncoder:
    """Make an encoder with a ChatML template. With ``template`` None it encodes plain text."""
    tokenizer = chatml_tokenizer()
    return TextEncoder(tokenizer, template, [], tokenizer.eos_token_id, "tokenizer")


#: Function that loads a kind of rows -> its section of the configuration.
SECTIONS: dict[Any, type[DataConfig]] = {
    load_sft: SftDataConfig,
    load_preferences: PreferenceDataConfig,
    load_prompts: PromptDataConfig,
}


def data_config(load: Callable[..., Any], **changes: object) -> Any:
    """Return the data section that a loader takes, with its defaults except for the changes."""
    return SECTIONS[load](train="unused.jsonl", **changes)


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_llama(folder: Path, config: dict[str, Any], *, score: bool = False) -> None:
    """Write a Llama of zeros with transformers' names, with ``lm_head`` or with ``score`` in its place."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    attention = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
    shapes = {"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{part}_proj": shape for part, shape in attention.items()}
        shapes |= {f"{name}.mlp.{part}_proj": (ffn, hidden) for part in ("gate", "up")}
        shapes |= {f"{name}.mlp.down_proj": (hidden, ffn)}
        shapes |= {f"{name}.{part}_layernorm": (hidden,) for part in ("input", "post_attention")}
    shapes |= {"score": (1, hidden)} if score else {"lm_head": (vocab, hidden)}
    tensors = {f"{name}.weight": numpy.zeros(shape, dtype=numpy.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

"""Inputs of a PPO-step benchmark: random models, a tokenizer whose tokens are words, prompts, and our configuration."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

ROLES = ("actor", "critic", "reference", "reward")
END_OF_SEQUENCE = "<|eos|>"


@dataclass(frozen=True)
class ModelShape:
    """The shape of a Llama, which all four roles have. Critic and reward model have a score head in place of the (untied)
    language-model head of actor and reference."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the language model."""
        head_size = self.hidden_size // self.num_heads
        attention = 2 * self.hidden_size * head_size * (self.num_heads + self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        norms = 2 * self.hidden_size
        embeddings = 2 * self.vocab_size * self.hidden_size
        return self.num_layers * (attention + mlp + norms) + embeddings + self.hidden_size


SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("2.4m", 4, 256, 512, 4, 2, 128),
        ModelShape("30m", 8, 512, 1536, 8, 4, 4096),
    )
}


@dataclass(frozen=True)
class Work:
    """One PPO step: every response has its full length (the end-of-sequence token does not stop it), one PPO epoch."""

    prompts_per_step: int = 64
    prompt_tokens: int = 16
    response_tokens: int = 64
    minibatch: int = 16

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens of a step's sequences, prompts included."""
        return self.prompts_per_step * (self.prompt_tokens + self.response_tokens)


@dataclass(frozen=True)
class Inputs:
    """Files of one model size."""

    models: dict[str, Path]  # role -> Hugging Face checkpoint folder
    prompts: Path  # JSONL


def write_tokenizer(shape: ModelShape, folder: Path) -> None:
    """Write a word-level tokenizer: id 0 is the end-of-sequence token, id i the word ``w<i>``."""
    vocabulary = {END_OF_SEQUENCE: 0, **{f"w{i}": i for i in range(1, shape.vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END_OF_SEQUENCE))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_SEQUENCE, pad_token=END_OF_SEQUENCE, model_max_length=512
    ).save_pretrained(folder)


def write_model(shape: ModelShape, role: str, seed: int, folder: Path) -> None:
    """Write a random checkpoint in fp32, with the tokenizer in its folder."""
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
        num_labels=1,
    )
    torch.manual_seed(seed)
    model_class = LlamaForCausalLM if role in ("actor", "reference") else LlamaForSequenceClassification
    model_class(config).save_pretrained(folder)
    write_tokenizer(shape, folder)


def write_prompts(shape: ModelShape, work: Work, steps: int, seed: int, path: Path) -> None:
    """Write prompts for ``steps`` steps, each of ``work.prompt_tokens`` words."""
    generator = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(work.prompts_per_step * steps):
            words = [f"w{generator.randrange(1, shape.vocab_size)}" for _ in range(work.prompt_tokens)]
            file.write(json.dumps({"prompt": " ".join(words)}) + "\n")


def write_inputs(shape: ModelShape, work: Work, steps: int, folder: Path) -> Inputs:
    """Write all files of one model size. Actor and reference start from the same weights, as after SFT."""
    disable_progress_bar()
    seeds = {"actor": 1, "reference": 1, "critic": 2, "reward": 3}
    paths = {role: folder / role for role in ROLES}
    for role, path in paths.items():
        write_model(shape, role, seeds[role], path)
    prompts = folder / "prompts.jsonl"
    write_prompts(shape, work, steps, seed=4, path=prompts)
    return Inputs(models=paths, prompts=prompts)


def our_config(inputs: Inputs, work: Work, dtype: str, steps: int, run_dir: Path, micro_batch: int) -> dict[str, Any]:
    """Return the PPO configuration of ``hetero_ppo`` for the work, without the features that a peer lacks.

    So old log-probs are those of the rollout, and roles stay on the device. There is one server per core.
    """
    sampling = {"temperature": 1.0, "max_tokens": work.response_tokens, "ignore_eos": True}

    def role(name: str) -> dict[str, Any]:
        return {"model": {"path": str(inputs.models[name]), "dtype": dtype}, "micro_batch_size": micro_batch}

    def trained(name: str) -> dict[str, Any]:
        return {**role(name), "optimizer": {"lr": 1e-6}}

    return {
        "kind": "ppo",
        "run": {"dir": str(run_dir), "tensorboard": False},
        "data": {"train": str(inputs.prompts), "apply_chat_template": False, "max_prompt_tokens": work.prompt_tokens},
        "actor": trained("actor"),
        "critic": trained("critic"),
        "reference": role("reference"),
        "reward_model": role("reward") | {"aligned": False},  # a peer has no aligned layers
        "algorithm": {
            "ppo_epochs": 1,
            "rollout_batch_size": work.prompts_per_step,
            "minibatch_size": work.minibatch,
            "kl": {"coef": 0.05},
            "old_log_probs": "rollout",
        },
        "rollout": {
            "max_num_seqs": work.prompts_per_step,
            "num_servers": min(num_cores(), work.prompts_per_step) if not torch.cuda.is_available() else 1,
            "sampling": sampling,
            "eval_sampling": sampling,
        },
        "residency": {"offload": False},
        "train": {"steps": steps, "dump_rollouts": False},
        "checkpoint": {"export_hf": False},
    }


def write_config(config: dict[str, Any], path: Path) -> None:
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))

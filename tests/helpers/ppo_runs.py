"""PPO runs on recorded rollouts with tiny random models, many of them in one launch: what the tests of layouts compare."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.chain import launch_all, read_metrics, write_data
from tests.helpers.re_encoding_cases import SCORER_TEMPLATE

NUM_STEPS = 3
MAX_TOKENS = 12  # of a response
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.1,
    "tie_word_embeddings": True,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
#: name of a model -> (model_type, config fields)
MODELS = {"dense": ("qwen3", SIZES), "moe": ("qwen3_moe", {**SIZES, **EXPERTS})}
AXES = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "sequence")

#: A reward function.
BREVITY = """
def score(prompt, response, label, metadata):
    return -len(response) / 8
"""

Layout = Mapping[str, object]


@dataclass(frozen=True)
class PpoRuns:
    """Models, data and rollouts, below one folder."""

    root: Path

    def command(
        self,
        name: str,
        model: str,
        roles: Mapping[str, Layout],
        steps: int,
        load: str | None = None,
        fields: Mapping[str, object] | None = None,
    ) -> list[str]:
        """Return the arguments of ``hetero-ppo`` for a run in ``<root>/<name>``.

        Args:
            model: Name of an entry of ``MODELS``.
            roles: Role -> fields of its layout, and other fields of the role ("optimizer.distributed").
            steps: Number of PPO steps that are done in the end.
            load: Name of the run to resume from.
            fields: Other fields of the configuration.
        """
        overrides: dict[str, object] = {"run.dir": self.root / name, "train.steps": steps, **(fields or {})}
        if load is not None:
            overrides["checkpoint.load"] = self.root / load
        for role, layout in roles.items():
            for field, value in layout.items():
                overrides[f"{role}.parallel.{field}" if field in AXES else f"{role}.{field}"] = value
        config = str(self.root / f"{model}.yaml")
        return ["train", "--config", config, *(f"{field}={_plain(value)}" for field, value in overrides.items())]

    def launch(self, num_processes: int, commands: Mapping[str, list[str]]) -> dict[str, dict[int, dict[str, float]]]:
        """Run all, in one launch. Returns name -> step -> metric -> value."""
        launch_all(num_processes, list(commands.values()))
        run_dirs = {name: command[3].removeprefix("run.dir=") for name, command in commands.items()}
        return {name: read_metrics(Path(folder)) for name, folder in run_dirs.items()}


def _plain(value: object) -> object:
    return str(value).lower() if isinstance(value, bool) else value


def prepare(root: Path, **sizes: int) -> PpoRuns:
    """Make the models, and three steps of random answers to every prompt.

    Args:
        sizes: Configuration fields of the models that differ from ``MODELS``.
    """
    from hetero_ppo.cli.main import main

    write_data(root / "data")
    prompts = (root / "data" / "prompts.jsonl").read_text().splitlines()[:16]
    (root / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
    tokenizer = ["tokenizer", "--input", str(root / "data" / "sft.jsonl"), "--vocab-size", "299"]
    assert main([*tokenizer, "--out", str(root / "tokenizer")]) == 0
    for model in MODELS:
        _save_models(root, model, sizes)
        (root / f"{model}.yaml").write_text(json.dumps(_config(root, model), indent=1))
    _write_rollouts(root)
    return PpoRuns(root)


def _save_models(root: Path, model: str, sizes: Mapping[str, int]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    model_type, fields = MODELS[model]
    vocab_size = len(AutoTokenizer.from_pretrained(root / "tokenizer"))
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=vocab_size, pad_token_id=0, num_labels=1, **{**fields, **sizes}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(root / model / "policy")
    AutoModelForSequenceClassification.from_config(config).save_pretrained(root / model / "scorer")


def prepare_scorer(root: Path) -> Path:
    """Make a scorer of another size, family, vocabulary and template, with its tokenizer, and a reward function."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from hetero_ppo.data.tokenizer_training import read_texts, train_tokenizer

    (root / "brevity.py").write_text(BREVITY)
    folder = root / "scorer"
    texts = read_texts(root / "data" / "preference.jsonl", ["prompt", "chosen"])
    tokenizer = train_tokenizer(texts, 280, folder, chat_template=SCORER_TEMPLATE)
    torch.manual_seed(1)
    sizes = {**SIZES, "hidden_size": 52, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    config = AutoConfig.for_model("llama", pad_token_id=0, num_labels=1, **sizes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


def _config(root: Path, model: str) -> dict[str, Any]:
    def role(name: str, micro_batch_size: int, lr: float | None = None) -> dict[str, Any]:
        source = {"path": str(root / model / name), "tokenizer": str(root / "tokenizer")}
        fields: dict[str, Any] = {"model": source, "micro_batch_size": micro_batch_size}
        return fields if lr is None else {**fields, "optimizer": {"lr": lr}}

    return {
        "kind": "ppo",
        "run": {"threads": 1},
        "data": {"train": str(root / "prompts.jsonl"), "max_prompt_tokens": 64},
        "actor": role("policy", 3, 1e-4),
        "critic": role("scorer", 4, 1e-4),
        "reference": role("policy", 8),
        "reward_model": role("scorer", 5),
        "algorithm": {
            "rollout_batch_size": 8,
            "samples_per_prompt": 2,
            "minibatch_size": 8,
            "entropy_coef": 0.01,
            "kl": {"loss_coef": 0.02},
        },
        "rollout": {"sampling": {"max_tokens": MAX_TOKENS, "temperature": 0.8}},
        "train": {"replay_rollouts": str(root / "rollouts"), "dump_rollouts": False},
        "checkpoint": {"export_hf": False},
    }


def _write_rollouts(root: Path) -> None:
    from hetero_ppo.config.load import load_config
    from hetero_ppo.data.chat_template import load_text_encoder
    from hetero_ppo.data.prompts import load_prompts
    from hetero_ppo.rollout.replay import RolloutRecord, write_records

    config = load_config(str(root / "dense.yaml"), [f"run.dir={root}"]).config
    encoder = load_text_encoder(config.actor.model, config.data, "actor")
    draw = random.Random(0)
    for step in range(NUM_STEPS):
        records = []
        examples = load_prompts(config.data.train, config.data, encoder).examples
        for example in [*examples, *examples]:
            tokens = [draw.randrange(5, 290) for _ in range(draw.randint(2, MAX_TOKENS))]
            log_probs = [-draw.random() for _ in tokens]
            finish = draw.choice(["stop", "length"])
            record = RolloutRecord(
                step + 1, example.index, example.prompt_ids, tokens, log_probs, finish, f"step{step}"
            )
            records.append(record)
        write_records(root / "rollouts", step + 1, records)

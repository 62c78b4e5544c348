"""Tiny models, recorded rollouts, and the configurations of PPO that are compared with the reference."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hetero_ppo.cli.main import main

NUM_STEPS, NUM_PROMPTS, NUM_SAMPLES, MAX_TOKENS, SUPERVISED_BATCH = 3, 8, 2, 9, 8
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "initializer_range": 0.15,
    "tie_word_embeddings": True,
}
#: What runs on every rank.
WORKER = Path(__file__).parent / "record_worker.py"
#: Scores from -6 to 3 or so; the first fails now and then, the second takes lists, the third is asynchronous.
FUNCTIONS = """
def score(prompt, response, label, metadata):
    if len(response) % 5 == 3:
        raise ValueError("a response of this length has no score")
    return 3 - len(response)


def scores(prompts, responses, labels, metadata):
    return [2.5 - len(response) for response in responses]


async def slow_score(prompt, response, label, metadata):
    return 1.5 - len(response)
"""
ENSEMBLE = ["scorer", "other_scorer"]

#: Dotted fields of a run, and values that are not their defaults. ``COMMON`` are those of every configuration.
COMMON: dict[str, Any] = {
    "algorithm.rollout_batch_size": NUM_PROMPTS,
    "algorithm.samples_per_prompt": NUM_SAMPLES,
    "algorithm.minibatch_size": 8,
    "rollout.sampling.max_tokens": MAX_TOKENS,
    "rollout.sampling.temperature": 1.3,
    "actor.micro_batch_size": 3,
    "critic.micro_batch_size": 5,
    "actor.optimizer.lr": 2e-3,
    "critic.optimizer.lr": 3e-3,
    "train.trace_every": 0,
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "penalised": {
        "algorithm.gamma": 0.98,
        "algorithm.lam": 0.9,
        "algorithm.clip_ratio": 0.1,
        "algorithm.dual_clip": 1.2,
        "algorithm.value_clip": 0.1,
        "algorithm.entropy_coef": 0.02,
        "algorithm.ppo_epochs": 2,
        "algorithm.truncated": "penalise",
        "algorithm.truncation_score": -2.5,
        "algorithm.kl.estimator": "k3",
        "algorithm.kl.controller": "adaptive",
        "algorithm.kl.coef": 0.1,
        "algorithm.kl.target": 0.5,
        "algorithm.kl.horizon": 60,
        "algorithm.kl.clamp": 0.3,
        "algorithm.kl.loss_coef": 0.03,
        "algorithm.kl.loss_estimator": "k2",
        "reward.source": "mix",
        "reward.function": "slow_score",
        "reward.concurrency": 3,
        "reward.function_weight": 0.3,
        "reward.normalise": True,
        "reward.clip": 1.1,
        "actor.optimizer.lr_schedule": "cosine",
        "actor.optimizer.warmup_steps": 3,
        "actor.optimizer.min_lr": 5e-4,
        "actor.optimizer.weight_decay": 0.1,
        "actor.optimizer.grad_clip": 0.3,
        "critic.optimizer.beta1": 0.8,
        "critic.optimizer.beta2": 0.99,
        "critic.optimizer.eps": 1e-3,
        "critic.optimizer.weight_decay": 0.2,
        "critic.optimizer.decay_norms_and_biases": True,
        "critic.optimizer.lr_schedule": "linear",
        "critic.optimizer.min_lr": 1e-4,
        "critic.optimizer.warmup_steps": 2,
        "critic.optimizer.grad_clip": 0.0,
    },
    "masked, weighted by token": {
        "algorithm.truncated": "mask",
        "algorithm.whiten_advantages": False,
        "algorithm.rollout_correction.kind": "truncated",
        "algorithm.rollout_correction.cap": 1.2,
        "algorithm.kl.estimator": "k2",
        "algorithm.kl.loss_coef": 0.05,
        "algorithm.kl.loss_estimator": "k1",
        "algorithm.kl.clamp": 0.5,
        "reward.source": "function",
        "reward.function": "score",
        "reward.workers": 1,
        "reward.on_error": "exclude",
        "reward.timeout_s": 30.0,
        "reward.clip": 0.0,
        "reward_model": None,
        "actor.optimizer.distributed": True,
        "actor.optimizer.weight_decay": 0.1,
        "actor.optimizer.eps": 1e-5,
    },
    "mixed, weighted by sequence": {
        "actor.optimizer.eps": 1e-6,
        "algorithm.rollout_correction.kind": "truncated",
        "algorithm.rollout_correction.level": "sequence",
        "algorithm.critic_warmup_steps": 1,
        "algorithm.minibatch_size": 4,
        "algorithm.kl.estimator": "k3+",
        "algorithm.kl.loss_coef": 0.1,
        "algorithm.kl.loss_estimator": "k3+",
        "algorithm.kl.clamp": 0.2,
        "reward.source": "mix",
        "reward.function": "scores",
        "reward.batch": 4,
        "reward.workers": 1,
        "reward.model_weight": 0.5,
        "reward.function_weight": -0.25,
        "reward.ensemble": "mean_minus_std",
        "reward.ensemble_k": 0.7,
        "reward.golden_every": 1,
        "reward_models": ENSEMBLE,
        "actor.optimizer.lr_schedule": "linear",
        "actor.optimizer.beta1": 0.85,
        "actor.optimizer.max_skipped_steps": 2,
        "critic.optimizer.distributed": True,
    },
    "the engine's log-probs": {
        "algorithm.old_log_probs": "rollout",
        "algorithm.clip_ratio": 0.4,
        "algorithm.critic_epochs": 2,
        "algorithm.critic_minibatch_size": 4,
        "algorithm.kl.loss_coef": 0.05,
        "algorithm.kl.clamp": None,
        "critic.model.path": "policy",
        "reward.ensemble": "min",
        "reward_models": ENSEMBLE,
    },
}
#: Kind of run -> its own fields.
SUPERVISED: dict[str, dict[str, Any]] = {
    "sft": {
        "actor.micro_batch_size": 3,
        "actor.optimizer.lr": 2e-3,
        "actor.optimizer.weight_decay": 0.1,
        "actor.optimizer.lr_schedule": "cosine",
        "actor.optimizer.warmup_steps": 1,
    },
    "rm": {
        "reward.micro_batch_size": 6,
        "reward.optimizer.lr": 2e-3,
        "reward.optimizer.grad_clip": 0.5,
        "loss.margin": 0.3,
        "loss.score_l2": 0.05,
    },
}
#: Layout -> number of processes, and fields of every role.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "DP 2": (2, {}),
    "TP 2": (2, {"tensor": 2}),
}


def folder(root: Path, name: str, layout: str) -> Path:
    """Return a run's folder, without commas and spaces, which have a meaning in overrides."""
    return root / f"{name}-{layout}".replace(",", "").replace(" ", "_").replace("'", "")


def prepare(root: Path) -> None:
    """Make models, prompts, three steps of recorded responses, and a config for every run."""
    (root / "functions.py").write_text(FUNCTIONS)
    prompts = [f"sort {'ab' * (i % 3)} {'c' * (i % 5)} {i}" for i in range(NUM_STEPS * NUM_PROMPTS)]
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    tokenizer = ["tokenizer", "--input", str(root / "prompts.jsonl"), "--vocab-size", "264"]
    assert main([*tokenizer, "--out", str(root / "tokenizer")]) == 0
    save_models(root)
    write_rollouts(root, prompts)
    write_supervised_data(root)
    for layout, (_, parallel) in LAYOUTS.items():
        for name in (*CONFIGURATIONS, *SUPERVISED):
            path = folder(root, name, layout)
            make = supervised_config if name in SUPERVISED else config
            path.with_suffix(".yaml").write_text(json.dumps(make(root, path, name, parallel), indent=1))


def config_files(root: Path, processes: int) -> list[Path]:
    """Write the configurations of the runs on so many processes. Return their paths."""
    layouts = [layout for layout, (number, _) in LAYOUTS.items() if number == processes]
    return [
        folder(root, name, layout).with_suffix(".yaml") for layout in layouts for name in (*CONFIGURATIONS, *SUPERVISED)
    ]


def save_models(root: Path) -> None:
    """Save a policy, another model as reference, a critic, and scorers with scores from about -20 to 20."""
    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")
    shape = AutoConfig.for_model("qwen3", vocab_size=len(tokenizer), pad_token_id=0, num_labels=1, **SIZES)
    for seed, name in enumerate(("policy", "reference", "critic", *ENSEMBLE)):
        torch.manual_seed(seed)
        maker = AutoModelForCausalLM if name in ("policy", "reference") else AutoModelForSequenceClassification
        model = maker.from_config(shape)
        for parameter in model.parameters():  # norms are not all ones
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, 1.0, 0.2)
        if name in ENSEMBLE:
            model.score.weight.data *= 10
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)


def write_rollouts(root: Path, prompts: list[str]) -> None:
    """Write responses of random tokens. The first two of each step have one token, and the second is truncated."""
    draw = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")
    policy = AutoModelForCausalLM.from_pretrained(root / "policy", dtype=torch.float32)
    (root / "rollouts").mkdir()
    for step in range(NUM_STEPS):
        records = []
        for sample in range(NUM_SAMPLES):
            for row in range(step * NUM_PROMPTS, (step + 1) * NUM_PROMPTS):
                messages = [{"role": "user", "content": prompts[row]}]
                start = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
                number = len(records)
                tokens = [draw.randrange(3, 260) for _ in range(1 if number < 2 else draw.randint(2, MAX_TOKENS))]
                with torch.no_grad():
                    logits = policy(torch.tensor([start + tokens])).logits[0, len(start) - 1 : -1] / 1.3
                log_probs = logits.log_softmax(dim=-1)[range(len(tokens)), tokens]
                noisy = [min(value + draw.gauss(0, 0.3), 0.0) for value in log_probs.tolist()]
                finish = "stop" if number == 0 else "length" if number == 1 else draw.choice(["stop", "stop", "length"])
                fields = ("prompt_index", "prompt_ids", "response_ids", "rollout_log_probs", "finish_reason")
                record = dict(zip(fields, (row, start, tokens, noisy, finish), strict=True))
                records.append({"step": step + 1, "weight_version": f"step{step}", **record})
        text = "".join(json.dumps(record) + "\n" for record in records)
        (root / "rollouts" / f"step_{step + 1:06d}.jsonl").write_text(text)


def write_supervised_data(root: Path) -> None:
    """Write conversations of one to three turns, and pairs, with answers of very different lengths."""
    draw = random.Random(1)

    def text(longest: int) -> str:
        return " ".join(draw.choice("abcdefg") * draw.randint(1, 3) for _ in range(draw.randint(1, longest)))

    conversations, pairs = [], []
    for _ in range(SUPERVISED_BATCH * (NUM_STEPS + 1)):
        roles = ["system"] * draw.randint(0, 1) + ["user", "assistant"] * draw.randint(1, 3)
        conversations.append({"messages": [{"role": name, "content": text(5)} for name in roles]})
        pairs.append({"prompt": text(3), "chosen": text(6), "rejected": text(6)})
    for name, rows in (("sft", conversations), ("rm", pairs)):
        lines = [json.dumps(row) + "\n" for row in rows]
        (root / f"{name}.jsonl").write_text("".join(lines[SUPERVISED_BATCH:]))
        (root / f"{name}_eval.jsonl").write_text("".join(lines[:SUPERVISED_BATCH]))


def with_fields(tree: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Return the tree of a YAML file with dotted fields put in."""
    for name, value in fields.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def role(root: Path, name: str, parallel: dict[str, Any]) -> dict[str, Any]:
    return {"model": {"path": str(root / name), "tokenizer": str(root / "tokenizer")}, "parallel": parallel}


def supervised_config(root: Path, run_dir: Path, kind: str, parallel: dict[str, Any]) -> dict[str, Any]:
    """Return the YAML tree of an SFT or reward-model run."""
    name, model = {"sft": ("actor", "policy"), "rm": ("reward", "critic")}[kind]
    data = {"train": str(root / f"{kind}.jsonl"), "eval": str(root / f"{kind}_eval.jsonl"), "max_sequence_tokens": 200}
    tree = {
        "kind": kind,
        "run": {"dir": str(run_dir), "threads": 1, "tensorboard": False},
        "data": {**data, "shuffle": False},
        name: role(root, model, parallel),
        "train": {"steps": NUM_STEPS, "global_batch_size": SUPERVISED_BATCH},
    }
    return with_fields(tree, SUPERVISED[kind])


def config(root: Path, run_dir: Path, name: str, parallel: dict[str, Any]) -> dict[str, Any]:
    """Return the YAML tree of a PPO run."""
    fields = {**COMMON, **CONFIGURATIONS[name]}
    tree: dict[str, Any] = {
        "kind": "ppo",
        "run": {"dir": str(run_dir), "threads": 1, "tensorboard": False},
        "data": {"train": str(root / "prompts.jsonl"), "max_prompt_tokens": 64, "shuffle": False},
        "actor": role(root, "policy", parallel),
        "critic": role(root, "critic", parallel),
        "reference": role(root, "reference", parallel),
        "reward_model": role(root, "scorer", parallel),
        "train": {"steps": NUM_STEPS, "replay_rollouts": str(root / "rollouts")},
        "checkpoint": {"export_hf": False},
    }
    tree = with_fields(tree, fields)
    tree["critic"]["model"]["path"] = str(root / fields.get("critic.model.path", "critic"))
    if "reward_models" in fields:
        tree["reward_model"] = None
        tree["reward_models"] = [role(root, scorer, parallel) for scorer in fields["reward_models"]]
    if "reward.function" in fields:
        tree["reward"]["function"] = f"{root / 'functions.py'}:{fields['reward.function']}"
    return tree

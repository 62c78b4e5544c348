"""What a run has recorded, read as the YAML and JSON that it is; and what a step makes of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import yaml

Rows = list[list[float]]  # of every response, one float a token


@dataclass
class Experience:
    """What is learned from. Empty rows are those that the losses leave out."""

    scores: list[float]  # NaN: the function has failed
    old: Rows
    ref: Rows
    values: Rows
    rewards: Rows
    advantages: Rows
    returns: Rows
    weights: Rows  # importance weights
    used: list[int]  # rows that the losses look at
    parts: dict[str, list[float]]  # what scores are made of, where that is more than one
    kl_coef: float


@dataclass
class Response:
    """One recorded response."""

    prompt: list[int]
    tokens: list[int]
    sampled: list[float]  # log-probs by what sampled the tokens
    text: str
    finish_reason: str

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


def read_responses(path: Path) -> list[Response]:
    """Read a rollout dump, in its order."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = ("prompt_ids", "response_ids", "rollout_log_probs", "response", "finish_reason")
    return [Response(*(row[name] for name in names)) for row in rows]


def read_config(run_dir: Path) -> SimpleNamespace:
    """Read the resolved config of a run: every option, whether it was given or not."""
    text = json.dumps(yaml.safe_load((run_dir / "config.yaml").read_text()))
    return json.loads(text, object_hook=lambda fields: SimpleNamespace(**fields))

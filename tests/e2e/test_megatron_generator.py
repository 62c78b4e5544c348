"""A PPO run whose actor is its own generator, on two data-parallel ranks, roles taking turns."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tests.helpers.chain import BATCH, read_metrics

from hetero_ppo.rollout.replay import read_rollouts, recorded_steps

pytestmark = pytest.mark.slow


def test_the_engine_is_the_trainer(two_processes: Path) -> None:
    """fp32: log-probs by way of the cache are those of whole forwards, before and after updates of the weights."""
    metrics = read_metrics(two_processes / "megatron")
    assert list(metrics) == [1, 2]
    for values in metrics.values():
        assert all(math.isfinite(value) for value in values.values())
        assert values["rollout/log_prob_diff_max"] < 1e-4
        assert values["rollout/probe_log_prob_diff"] < 1e-4
        assert values["rollout/ratio_outside_share"] == 0
    assert abs(metrics[1]["kl/reference"]) < 1e-5 < abs(metrics[2]["kl/reference"])


def test_rollouts_carry_the_version_that_made_them(two_processes: Path) -> None:
    folder = two_processes / "megatron" / "rollouts"
    assert recorded_steps(folder) == [1, 2]
    for step in (1, 2):
        rows = read_rollouts(folder / f"step_{step:06d}.jsonl")
        assert len(rows) == BATCH and {row.weight_version for row in rows} == {f"step{step - 1}"}


def test_it_evaluates_and_starts_no_server(two_processes: Path) -> None:
    run_dir = two_processes / "megatron"
    for name in ("before", "after"):
        found = json.loads((run_dir / f"eval_{name}.json").read_text())
        assert found["num_prompts"] == 12 and 0 <= found["greedy_accuracy"] <= 1
    assert not (run_dir / "rollout").exists()

"""An experience compares the generator with the trainer, and stops a run that is over the bounds."""

from __future__ import annotations

import math
import re

import pytest
import torch
from omegaconf import OmegaConf

from hetero_ppo.config.schema import (
    AlgorithmConfig,
    OldLogProbs,
    PpoConfig,
    RolloutCorrectionConfig,
    RolloutCorrectionKind,
)
from hetero_ppo.experience.rollouts import build_rollout
from hetero_ppo.experience.stages import compare_with_generator
from hetero_ppo.health.check import Severity
from hetero_ppo.health.mismatch import Bound, MismatchGuard, mismatch_bounds
from hetero_ppo.types import PromptBatch, Rollout

FIGURES = {
    "rollout/log_prob_diff_mean",
    "rollout/log_prob_diff_max",
    "rollout/ratio_outside_share",
    "rollout/mismatch_kl",
}


def rollout_of(log_probs: list[float]) -> Rollout:
    """Make a rollout of one response to a prompt of two tokens."""
    prompts = PromptBatch([[5, 6]], ["?"], [None], [0], [None], [{}])
    count = len(log_probs)
    return build_rollout(
        prompts,
        torch.tensor([count]),
        torch.arange(count)[None],
        torch.tensor([log_probs]),
        torch.tensor([False]),
        "step0",
    )


def test_what_is_compared_and_what_is_corrected() -> None:
    rollout = rollout_of([-1.0, -2.0, -3.0])
    old = (rollout.rollout_log_probs + torch.tensor([0.0, 3.0, 0.0, -0.5])).masked_fill(~rollout.response_mask, 0)
    of_engine = AlgorithmConfig(old_log_probs=OldLogProbs.rollout)
    assert compare_with_generator(of_engine, rollout, old, rollout.response_mask) == (None, {})
    weights, metrics = compare_with_generator(AlgorithmConfig(), rollout, old, rollout.response_mask)
    assert weights is None and set(metrics) == FIGURES and metrics["rollout/log_prob_diff_max"] == 3
    correction = RolloutCorrectionConfig(kind=RolloutCorrectionKind.truncated)
    weights, metrics = compare_with_generator(
        AlgorithmConfig(rollout_correction=correction), rollout, old, rollout.response_mask
    )
    torch.testing.assert_close(weights, torch.tensor([[0.0, 2.0, 1.0, 0.60653]]), atol=1e-5, rtol=0)
    assert set(metrics) == FIGURES | {"actor/tis_weight_mean", "actor/tis_clipped_share"}


REQUIRED = ["run.dir=r", "data.train=t", *(f"{role}.model.path=m" for role in ("actor", "critic", "reference"))]


def ppo_config(*overrides: str) -> PpoConfig:
    return OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(PpoConfig), OmegaConf.from_dotlist(["actor.model.dtype=fp32", *overrides]))
    )


@pytest.mark.parametrize(
    ("overrides", "limits"),
    [
        ([], [1e-3, 0.01]),
        (["actor.model.dtype=bf16"], [0.1, 1.0]),
        (["rollout.dtype=bf16"], [0.1, 1.0]),  # the coarser of the two decides
        (["actor.model.dtype=bf16", "rollout.dtype=fp32"], [0.1, 1.0]),
        (["rollout.mismatch.max_log_prob_diff_mean=0.5"], [0.5, 0.01]),
        (["rollout.sampling.top_p=0.9"], []),
        (["rollout.sampling.top_k=20", "rollout.mismatch.max_ratio_outside_share=0"], [0.0]),
        (["train.replay_rollouts=recorded"], []),
        (["algorithm.old_log_probs=rollout"], []),
    ],
)
def test_bounds_of_a_run(overrides: list[str], limits: list[float]) -> None:
    assert [bound.limit for bound in mismatch_bounds(ppo_config(*REQUIRED, *overrides))] == limits


MEAN = Bound("rollout/log_prob_diff_mean", "rollout.mismatch.max_log_prob_diff_mean", 0.1)
SHARE = Bound("rollout/ratio_outside_share", "rollout.mismatch.max_ratio_outside_share", 0.5)


def step_metrics(mean: float, share: float = 0.0) -> dict[str, float]:
    return {"rollout/log_prob_diff_mean": mean, "rollout/ratio_outside_share": share, "reward/mean": 7.0}


@pytest.mark.parametrize(
    ("means", "patience", "stops_at"),
    [
        ([0.0, 0.1, 0.05], 1, None),  # on the bound is not beyond it
        ([0.0, 0.11], 1, 2),
        ([math.nan], 1, 1),
        ([0.2, 0.2, 0.0, 0.2, 0.2, 0.0], 3, None),  # a good step begins the count again
        ([0.2, 0.0, 0.2, 0.2, 0.2], 3, 5),
    ],
)
def test_a_run_stops_after_so_many_steps_in_a_row(means: list[float], patience: int, stops_at: int | None) -> None:
    guard = MismatchGuard([MEAN, SHARE], patience)
    for step, mean in enumerate(means, start=1):
        found = guard.check(step, step_metrics(mean))
        assert (found is None) == (mean <= 0.1)
        if step == stops_at:
            assert found is not None and found.severity is Severity.stop and found.step == step
            assert re.search(f"step {step}: .*max_log_prob_diff_mean \\(0.1\\), for {patience} step", found.message)
            return
        assert found is None or found.severity is Severity.warning
    assert stops_at is None


def test_steps_beyond_different_bounds_count_together_and_the_message_has_the_figures() -> None:
    guard = MismatchGuard([MEAN, SHARE], patience=2)
    first = guard.check(1, step_metrics(0.25))
    assert first is not None
    assert "0.25 exceeds rollout.mismatch.max_log_prob_diff_mean (0.1); step 1 in a row of 2" in first.message
    second = guard.check(2, step_metrics(0.05, share=0.75))
    assert second is not None and second.severity is Severity.stop
    message = second.message
    assert "rollout/ratio_outside_share 0.75 exceeds rollout.mismatch.max_ratio_outside_share (0.5)" in message
    assert "rollout/log_prob_diff_mean 0.05, rollout/ratio_outside_share 0.75. It was not trained on" in message
    assert "reward/mean" not in message and "algorithm.rollout_correction.kind=truncated" in message
    assert second.values == {"rollout/log_prob_diff_mean": 0.05, "rollout/ratio_outside_share": 0.75}


def test_a_run_without_bounds_has_no_guard() -> None:
    assert MismatchGuard.for_run(ppo_config(*REQUIRED, "algorithm.old_log_probs=rollout")) is None
    guard = MismatchGuard.for_run(ppo_config(*REQUIRED, "rollout.mismatch.patience=3"))
    assert guard is not None and guard.patience == 3 and len(guard.bounds) == 2

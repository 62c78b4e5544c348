"""Scores, their running moments, and rewards per token."""

import pytest
import torch

from hetero_ppo.algorithms.rewards import (
    RunningMoments,
    apply_truncation,
    clip_scores,
    ensemble_score,
    mix_scores,
    normalise_scores,
    token_level_rewards,
)
from hetero_ppo.config.schema import EnsembleScore, TruncatedResponses

MASK = torch.tensor([[False, True, True, False], [True, True, True, True], [False, False, False, False]])


def test_token_level_rewards_by_hand() -> None:
    kl = torch.tensor([[9.0, 1.0, 2.0, 9.0], [1.0, -1.0, 0.0, 4.0], [5.0, 5.0, 5.0, 5.0]])
    rewards = token_level_rewards(torch.tensor([10.0, -3.0, 7.0]), None, kl, MASK, kl_coef=0.5)
    assert rewards.tolist() == [[0.0, -0.5, 9.0, 0.0], [-0.5, 0.5, 0.0, -5.0], [0.0, 0.0, 0.0, 0.0]]


def test_process_scores_by_hand() -> None:
    """Two steps in each of the first rows, the last of which ends the response; what lies outside the mask counts nowhere."""
    kl = torch.tensor([[9.0, 1.0, 2.0, 9.0], [1.0, -1.0, 0.0, 4.0], [5.0, 5.0, 5.0, 5.0]])
    process = torch.tensor([[8.0, 4.0, -2.0, 8.0], [0.0, 0.25, 0.0, 1.0], [3.0, 3.0, float("nan"), 3.0]])
    rewards = token_level_rewards(torch.tensor([10.0, -3.0, 7.0]), process, kl, MASK, kl_coef=0.5)
    assert rewards.tolist() == [[0.0, 3.5, 7.0, 0.0], [-0.5, 0.75, 0.0, -4.0], [0.0, 0.0, 0.0, 0.0]]


def test_ensemble_scores_by_hand() -> None:
    """Means 2 and -1; population variances ((1 - 2)^2 + (3 - 2)^2) / 2 = 1 and (4^2 + 4^2) / 2 = 16."""
    scores = torch.tensor([[1.0, 3.0], [3.0, -5.0]])
    assert ensemble_score(scores, EnsembleScore.mean, 1.0).tolist() == [2.0, -1.0]
    assert ensemble_score(scores, EnsembleScore.min, 1.0).tolist() == [1.0, -5.0]
    assert ensemble_score(scores, EnsembleScore.mean_minus_std, 0.5).tolist() == [1.5, -3.0]
    alike = torch.tensor([[0.1], [0.1], [0.1]])
    assert all(torch.equal(ensemble_score(alike, how, 2.0), alike[0]) for how in EnsembleScore)


def test_mixed_scores_by_hand() -> None:
    model, function = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, float("nan"), -1.0])
    mixed = mix_scores([(2.0, model), (-1.0, function)])
    assert mixed.dtype == torch.float32 and mixed[0] == 1.5 and mixed[1].isnan() and mixed[2] == 7.0
    assert mix_scores([(1.0, torch.tensor([1.0])), (1.0, torch.tensor([2.0**-24]))]).item() == 1.0, (
        "rounded once, to even"
    )
    assert mix_scores([(2.5, torch.tensor([2.0**-24])), (1.0, torch.tensor([1.0]))]).item() == 1.0 + 2.0**-23


def test_clip_scores() -> None:
    scores = torch.tensor([-12.0, 0.5, 30.0])
    assert clip_scores(scores, 10.0).tolist() == [-10.0, 0.5, 10.0]
    assert clip_scores(scores, 0.0).tolist() == scores.tolist()


def test_truncated_responses() -> None:
    scores, truncated = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([False, True, False])
    same = apply_truncation(scores, MASK, truncated, TruncatedResponses.score, -1.0)
    assert torch.equal(same[0], scores) and torch.equal(same[1], MASK)
    penalised = apply_truncation(scores, MASK, truncated, TruncatedResponses.penalise, -1.0)
    assert penalised[0].tolist() == [1.0, -1.0, 3.0] and torch.equal(penalised[1], MASK)
    masked = apply_truncation(scores, MASK, truncated, TruncatedResponses.mask, -1.0)
    assert torch.equal(masked[0], scores)
    assert masked[1].any(dim=1).tolist() == [True, False, False]
    assert torch.equal(masked[1][0], MASK[0])


def test_running_moments_are_those_of_all_values_in_any_batches() -> None:
    values = 1e4 + torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one_by_one, batches, left, right = (RunningMoments() for _ in range(4))
    for value in values:
        one_by_one.update(value)
    for batch in values.split([1, 60, 0, 39]):
        batches.update(batch)
    left.update(values[:33])
    right.update(values[33:])
    left.merge(**right.state_dict())
    for moments in (one_by_one, batches, left):
        assert moments.count == 100
        assert moments.mean == pytest.approx(values.mean().item(), rel=1e-12)
        assert moments.var == pytest.approx(values.var(unbiased=False).item(), rel=1e-9)


def test_running_moments_before_the_first_value() -> None:
    moments = RunningMoments()
    moments.merge(0.0, 0.0, 0.0)
    moments.update(torch.empty(0))
    assert (moments.count, moments.mean, moments.var) == (0.0, 0.0, 0.0)


def test_running_moments_resume() -> None:
    source, resumed = RunningMoments(), RunningMoments()
    source.update(torch.tensor([1.0, 2.0, 6.0]))
    resumed.load_state_dict(source.state_dict())
    source.update(torch.tensor([4.0]))
    resumed.update(torch.tensor([4.0]))
    assert resumed.state_dict() == source.state_dict()


def test_normalise_scores() -> None:
    moments = RunningMoments()
    scores = torch.tensor([1.0, 3.0])
    moments.update(scores)
    assert normalise_scores(scores, moments.mean, moments.var).tolist() == pytest.approx([-1.0, 1.0])
    assert normalise_scores(torch.tensor([5.0]), 5.0, 0.0).tolist() == [0.0]

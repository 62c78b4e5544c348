"""Edges that mutation testing of ``hetero_ppo/algorithms`` found to be without a test (docs/proof.md)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hetero_ppo.algorithms.kl import AdaptiveKlController, FixedKlController, kl_estimate
from hetero_ppo.algorithms.losses import (
    Loss,
    bradley_terry_loss,
    kl_loss,
    mean_metrics,
    policy_loss,
    sft_loss,
    value_loss,
)
from hetero_ppo.algorithms.masking import whiten
from hetero_ppo.algorithms.rewards import apply_truncation, clip_scores, normalise_scores, token_level_rewards
from hetero_ppo.algorithms.sampling import sample_tokens
from hetero_ppo.algorithms.schedules import lr_at
from hetero_ppo.config.schema import KlEstimator, LrSchedule, OptimizerConfig

ONE = torch.ones(1, 1, dtype=torch.bool)


def one_token(advantage: float, log_ratio: float = 0.0, dual_clip: float | None = None) -> Loss:
    old, advantages = torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), advantage, dtype=torch.float64)
    return policy_loss(old + log_ratio, old, advantages, ONE, clip_ratio=0.2, dual_clip=dual_clip, denominator=1)


def test_a_ratio_is_bounded_from_below() -> None:
    assert float(one_token(1.0, -30.0).metric_sums["actor/ratio_mean"]) == pytest.approx(math.exp(-20))


def test_dual_clip_leaves_tokens_of_a_small_advantage_alone() -> None:
    assert one_token(0.5, math.log(1.1), dual_clip=3.0).loss.item() == pytest.approx(-0.55)


def test_a_token_on_the_bound_of_dual_clip_is_not_bounded() -> None:
    assert float(one_token(-2.0, 0.0, dual_clip=1.0).metric_sums["actor/pg_clipfrac_lower"]) == 0


def test_the_value_is_clipped_below_the_old_one_too() -> None:
    """Old value 1, return 0: a value of 0.5 counts as 0.8, and is held there."""
    values = torch.full((1, 1), 0.5, requires_grad=True)
    result = value_loss(values, torch.ones(1, 1), torch.zeros(1, 1), ONE, value_clip=0.2, denominator=1)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(0.5 * 0.8**2) and values.grad is not None and values.grad.item() == 0


def test_explained_variance_of_returns_that_are_all_zero_is_unknown() -> None:
    result = value_loss(torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1, 2), ONE.expand(1, 2), None, 2)
    assert math.isnan(mean_metrics(result.metric_sums, result.count)["critic/vf_explained_var"])


def test_losses_are_divided_by_the_minibatchs_count() -> None:
    """Four pairs, or five tokens, of which this micro-batch has one."""
    log_probs = torch.tensor([[-2.0]])
    assert sft_loss(log_probs, ONE, 5).loss.item() == pytest.approx(0.4)
    one, zero = torch.tensor([1.0]), torch.tensor([0.0])
    with_l2, without = (bradley_terry_loss(one, zero, 0.0, weight, 4).loss.item() for weight in (0.5, 0.0))
    assert with_l2 - without == pytest.approx(0.5 * (1 + 0) / 2 / 4)
    assert without == pytest.approx(math.log1p(math.exp(-1)) / 4)


def test_the_kl_loss_is_clamped() -> None:
    loss = kl_loss(
        torch.full((1, 1), -1.0), torch.full((1, 1), -4.0), ONE, KlEstimator.k1, 0.5, kl_loss_coef=1.0, denominator=1
    )
    assert loss.loss.item() == 0.5


def test_a_minibatch_without_tokens_says_what_to_do() -> None:
    message = (
        r"every response of it was truncated. Raise rollout.sampling.max_tokens or algorithm.minibatch_size, or set "
        r"algorithm.truncated to score or penalise$"
    )
    with pytest.raises(ValueError, match=message):
        sft_loss(torch.zeros(1, 1), ONE, 0)


def test_whitening_and_normalising_divide_by_the_standard_deviation() -> None:
    """Mean 3, variance 4; and where the variance is 0, all is 0."""
    values, mask = torch.tensor([[1.0, 3.0, 7.0]]), torch.tensor([[True, True, False]])
    assert whiten(values, mask, 3.0, 4.0).tolist() == [pytest.approx([-1.0, 0.0, 0.0])]
    assert normalise_scores(values[0], 3.0, 4.0).tolist() == pytest.approx([-1.0, 0.0, 2.0])
    for flat in (whiten(torch.full((1, 3), 5.0), mask, 5.0, 0.0), normalise_scores(torch.full((3,), 5.0), 5.0, 0.0)):
        assert flat.dtype == torch.float32 and not flat.any()


def test_scores_are_clipped_below_one_and_keep_the_dtype_of_the_kl() -> None:
    assert clip_scores(torch.tensor([0.7, -0.2]), 0.5).tolist() == pytest.approx([0.5, -0.2])
    assert (
        token_level_rewards(torch.ones(1, dtype=torch.float64), None, torch.zeros(1, 1), ONE, 0.1).dtype
        == torch.float32
    )


def test_the_kl_controllers_edges() -> None:
    assert FixedKlController(0.3).state_dict() == {"controller": "fixed", "coef": 0.3}
    FixedKlController(0.1).load_state_dict(FixedKlController(0.3).state_dict())
    assert AdaptiveKlController(0.1, target=1.0, horizon=1).horizon == 1
    controller = AdaptiveKlController(0.1, target=1.0, horizon=10)
    controller.update(0.0, num_samples=49)  # the coefficient keeps 2 % of its size
    assert controller.coef == pytest.approx(0.1 * (1 - 0.2 * 49 / 10))
    with pytest.raises(ValueError, match=r"Set it above 10$"):
        controller.update(0.0, num_samples=50)


UNKNOWN: Any = "another"


def test_unknown_choices_name_their_field() -> None:
    zeros = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=r"set algorithm.kl.estimator to k1"):
        kl_estimate(zeros, zeros, UNKNOWN, None)
    with pytest.raises(ValueError, match=r"algorithm.truncated is 'another': set it to score, penalise or mask"):
        apply_truncation(zeros[0], ONE, ONE[0], UNKNOWN, 0.0)
    with pytest.raises(ValueError, match=r"optimizer.lr_schedule is 'another': set it to constant, linear or cosine"):
        lr_at(0, OptimizerConfig(lr_schedule=UNKNOWN), 10)


def test_a_schedule_of_one_step_after_the_warm_up_ends() -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.1, lr_schedule=LrSchedule.linear, warmup_steps=2)
    assert [lr_at(step, config, 3) for step in range(4)] == pytest.approx([1 / 3, 2 / 3, 1.0, 0.1])


def drawn(logits: list[float], uniforms: list[float], top_p: float = 1.0, top_k: int = -1) -> list[int]:
    rows, numbers = torch.tensor([logits] * len(uniforms)), torch.tensor(uniforms, dtype=torch.float64)
    return sample_tokens(rows, numbers, temperature=1.0, top_p=top_p, top_k=top_k)[0].tolist()


def test_the_smallest_and_the_whole_of_top_k_and_top_p() -> None:
    equal = [0.0] * 4
    grid = [0.1, 0.3, 0.6, 0.9]
    assert drawn([0.0, 1.0, 0.5, 0.0], grid, top_k=1) == [1] * 4
    assert drawn(equal, grid, top_k=0) == drawn(equal, grid, top_k=-1) == [0, 1, 2, 3]
    # Two of four equal tokens are exactly the half that is asked for.
    assert set(drawn(equal, grid, top_p=0.5)) == {0, 1}
    # Without a cut a token of 2e-9 stays, although the probabilities before it round to 1.
    assert drawn([0.0, -20.0], [1 - 2**-53]) == [1]


def test_probabilities_are_added_in_float64() -> None:
    """The sampler draws, of 100,000 equal tokens, the one whose middle the random number is. In float32 the sums drift by many tokens."""
    size = 100_000
    tokens = [17, 50_000, 99_990]
    assert drawn([0.0] * size, [(token + 0.5) / size for token in tokens]) == tokens


def test_the_largest_random_number_gives_a_token_whatever_the_probabilities_sum_to() -> None:
    logits = torch.randn(300, 11, generator=torch.Generator().manual_seed(0))
    uniforms = torch.full((300,), 1 - 2**-53, dtype=torch.float64)
    totals = logits.softmax(-1).double().sum(-1)
    assert bool((totals < 1).any()) and bool((totals > 1).any())
    tokens, _ = sample_tokens(logits, uniforms, temperature=1.0, top_p=1.0, top_k=-1)
    assert tokens.tolist() == [10] * 300

"""Losses by hand, and what must not change them."""

import math

import pytest
import torch

from hetero_ppo.algorithms.losses import (
    add_metric_sums,
    bradley_terry_loss,
    entropy_bonus,
    kl_loss,
    mean_metrics,
    policy_loss,
    sft_loss,
    value_loss,
)
from hetero_ppo.config.schema import KlEstimator


def one_token_policy_loss(ratio: float, advantage: float, dual_clip: float | None = None):
    """Return the loss at clip_ratio 0.2 and its derivative with respect to the ratio's logarithm."""
    log_prob = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    result = policy_loss(
        log_prob,
        torch.zeros(1, 1, dtype=torch.float64),
        torch.tensor([[advantage]], dtype=torch.float64),
        torch.ones(1, 1, dtype=torch.bool),
        clip_ratio=0.2,
        dual_clip=dual_clip,
        denominator=1,
    )
    result.loss.backward()
    return result.loss.item(), log_prob.grad.item(), mean_metrics(result.metric_sums, result.count)


@pytest.mark.parametrize(
    "ratio, advantage, dual_clip, loss, gradient, clipped, bounded",
    [
        (1.1, 2.0, None, -2.2, -2.2, 0, 0),  # inside the range
        (1.5, 2.0, None, -2.4, 0.0, 1, 0),  # good token, ratio above: clipped
        (0.5, 2.0, None, -1.0, -1.0, 0, 0),  # good token, ratio below: the pessimistic term is the plain one
        (0.5, -2.0, None, 1.6, 0.0, 1, 0),  # bad token, ratio below: clipped
        (1.5, -2.0, None, 3.0, 3.0, 0, 0),  # bad token, ratio above: not clipped
        (5.0, -2.0, 3.0, 6.0, 0.0, 0, 1),  # ... unless dual clip bounds it at c |A|
        (2.0, -2.0, 3.0, 4.0, 4.0, 0, 0),  # under the bound
        (5.0, 2.0, 3.0, -2.4, 0.0, 1, 0),  # dual clip leaves good tokens alone
    ],
)
def test_policy_loss_by_hand(
    ratio: float, advantage: float, dual_clip: float | None, loss: float, gradient: float, clipped: int, bounded: int
) -> None:
    got_loss, got_gradient, metrics = one_token_policy_loss(ratio, advantage, dual_clip)
    assert got_loss == pytest.approx(loss)
    assert got_gradient == pytest.approx(gradient)
    assert metrics == {
        "actor/pg_loss": pytest.approx(loss),
        "actor/pg_clipfrac": clipped,
        "actor/pg_clipfrac_lower": bounded,
        "actor/ppo_kl": pytest.approx(-math.log(ratio)),
        "actor/ratio_mean": pytest.approx(ratio),
    }


def test_gradient_at_ratio_one_is_the_policy_gradient() -> None:
    for advantage in (2.0, -2.0):
        assert one_token_policy_loss(1.0, advantage, dual_clip=3.0)[1] == pytest.approx(-advantage)


def test_policy_loss_survives_extreme_ratios() -> None:
    log_probs = torch.tensor([[0.0, -500.0, 7.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    result = policy_loss(log_probs, torch.tensor([[-500.0, 0.0, 0.0]]), -torch.ones(1, 3), mask, 0.2, None, 2)
    result.loss.backward()
    assert math.isfinite(result.loss.item()) and torch.isfinite(log_probs.grad).all()
    assert log_probs.grad[0, 2] == 0


@pytest.mark.parametrize(
    "value, value_clip, loss, gradient, clipped",
    [
        (1.1, 0.2, 0.5 * 0.9**2, -0.9, 0),  # old value 1, return 2: inside
        (1.5, 0.2, 0.5 * 0.8**2, 0.0, 1),  # moved towards the return beyond the clip: held
        (1.5, None, 0.5 * 0.5**2, -0.5, 0),
        (0.5, 0.2, 0.5 * 1.5**2, -1.5, 0),  # moved away: the plain error is larger, and it pulls back
    ],
)
def test_value_loss_by_hand(value: float, value_clip: float | None, loss: float, gradient: float, clipped: int) -> None:
    values = torch.tensor([[value, 77.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False]])
    old_values = torch.ones(1, 2, dtype=torch.float64)
    result = value_loss(values, old_values, 2 * old_values, mask, value_clip, denominator=1)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(loss)
    assert values.grad.tolist() == [[pytest.approx(gradient), 0.0]]
    metrics = mean_metrics(result.metric_sums, result.count)
    assert metrics["critic/vf_loss"] == pytest.approx(loss)
    assert metrics["critic/vf_clipfrac"] == clipped
    assert metrics["critic/vpred_mean"] == pytest.approx(value)
    assert metrics["critic/returns/mean"] == pytest.approx(2.0)
    assert math.isnan(metrics["critic/vf_explained_var"])  # one return has no variance


def test_explained_variance() -> None:
    returns = 100 + torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)

    def explained(old_values: torch.Tensor):
        result = value_loss(torch.zeros(1, 4), old_values, returns, mask, 0.2, 4)
        return mean_metrics(result.metric_sums, result.count)["critic/vf_explained_var"]

    assert explained(returns) == pytest.approx(1.0)
    assert explained(returns + 5) == pytest.approx(1.0)  # a constant offset is no variance
    assert explained(torch.zeros(1, 4)) == pytest.approx(0.0)
    noisy = returns + torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    assert explained(noisy) == pytest.approx(1 - 1 / returns.var(unbiased=False).item(), rel=1e-5)


def test_entropy_bonus_and_kl_loss() -> None:
    mask = torch.tensor([[True, True, False]])
    entropy = torch.tensor([[1.0, 3.0, 50.0]], requires_grad=True)
    bonus = entropy_bonus(entropy, mask, entropy_coef=0.1, denominator=2)
    bonus.loss.backward()
    assert bonus.loss.item() == pytest.approx(-0.2)
    assert entropy.grad[0].tolist() == pytest.approx([-0.05, -0.05, 0.0])
    assert mean_metrics(bonus.metric_sums, bonus.count) == {"actor/entropy": 2.0}
    assert not entropy_bonus(entropy, mask, 0.0, 2).loss.requires_grad

    log_probs = torch.tensor([[-1.0, -2.0, -9.0]], requires_grad=True)
    kl = kl_loss(
        log_probs, torch.tensor([[-2.0, -2.0, 0.0]]), mask, KlEstimator.k2, clamp=None, kl_loss_coef=0.5, denominator=2
    )
    kl.loss.backward()
    assert kl.loss.item() == pytest.approx(0.125)  # 0.5 * (0.5 + 0) / 2
    assert log_probs.grad[0].tolist() == pytest.approx([0.25, 0.0, 0.0])
    assert mean_metrics(kl.metric_sums, kl.count) == {"actor/kl_loss": 0.25}


def test_terms_add_up() -> None:
    mask = torch.tensor([[True, False]])
    total = sft_loss(torch.tensor([[-2.0, -5.0]]), mask, 1) + entropy_bonus(torch.tensor([[3.0, 1.0]]), mask, 0.5, 1)
    assert total.loss.item() == 0.5 and total.count.item() == 1
    assert mean_metrics(total.metric_sums, total.count) == {"sft/loss": 2.0, "actor/entropy": 3.0}


def test_bradley_terry_by_hand() -> None:
    chosen, rejected = torch.tensor([2.0, 0.0], requires_grad=True), torch.tensor([1.0, 0.0], requires_grad=True)
    result = bradley_terry_loss(chosen, rejected, margin=0.0, score_l2=0.0, denominator=2)
    result.loss.backward()
    expected = (math.log1p(math.exp(-1.0)) + math.log(2.0)) / 2
    assert result.loss.item() == pytest.approx(expected)
    gradient = [-0.5 / (1 + math.e), -0.25]
    assert chosen.grad.tolist() == pytest.approx(gradient)
    assert rejected.grad.tolist() == pytest.approx([-g for g in gradient])
    assert mean_metrics(result.metric_sums, result.count) == {
        "rm/loss": pytest.approx(expected),
        "rm/accuracy": 0.5,  # a tie is a miss
        "rm/score_margin": 0.5,
        "rm/chosen_score": 1.0,
        "rm/rejected_score": 0.5,
    }


def test_bradley_terry_margin_and_l2() -> None:
    chosen, rejected = torch.tensor([3.0]), torch.tensor([1.0])
    plain = math.log1p(math.exp(-0.5))
    result = bradley_terry_loss(chosen, rejected, margin=1.5, score_l2=0.0, denominator=1)
    assert result.loss.item() == pytest.approx(plain)
    result = bradley_terry_loss(chosen, rejected, margin=1.5, score_l2=0.1, denominator=1)
    assert result.loss.item() == pytest.approx(plain + 0.1 * (9 + 1) / 2)
    far = bradley_terry_loss(torch.tensor([-500.0]), torch.tensor([500.0]), 0.0, 0.0, 1)
    assert far.loss.item() == pytest.approx(1000.0)  # no overflow


def test_sft_loss_by_hand() -> None:
    log_probs = torch.tensor([[-1.0, -2.0, -30.0], [-3.0, -40.0, -50.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    result = sft_loss(log_probs, mask, denominator=3)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(2.0)
    assert torch.equal(log_probs.grad, mask * torch.tensor(-1 / 3))


def test_no_token_is_an_error() -> None:
    mask = torch.zeros(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="algorithm.truncated"):
        sft_loss(torch.zeros(1, 2), mask, denominator=0)


def _all_terms(t: dict[str, torch.Tensor], rows: slice, columns: int, denominator: float):
    """Return every loss term of actor and critic on some rows and columns of a minibatch."""
    x = {name: value[rows, :columns] for name, value in t.items()}
    policy = policy_loss(x["log_probs"], x["old_log_probs"], x["advantages"], x["mask"], 0.2, 3.0, denominator)
    kl = kl_loss(x["log_probs"], x["ref_log_probs"], x["mask"], KlEstimator.k3, 10.0, 0.1, denominator)
    bonus = entropy_bonus(x["entropy"], x["mask"], 0.01, denominator)
    value = value_loss(x["values"], x["old_values"], x["returns"], x["mask"], 0.2, denominator)
    return policy + kl + bonus + value


def _minibatch():
    generator = torch.Generator().manual_seed(5)
    names = ["log_probs", "old_log_probs", "ref_log_probs", "advantages", "entropy", "values", "old_values", "returns"]
    tensors = {name: torch.randn(8, 12, generator=generator, dtype=torch.float64) for name in names}
    lengths = torch.tensor([3, 12, 7, 1, 9, 0, 5, 5])  # ragged: a mean of micro-batch means would differ
    tensors["mask"] = torch.arange(12) < lengths[:, None]
    for name in ("log_probs", "entropy", "values"):
        tensors[name].requires_grad_()
    return tensors, lengths


@pytest.mark.parametrize("cuts", [[8], [4, 4], [1, 2, 5], [1] * 8])
def test_micro_batches_sum_to_the_minibatch(cuts: list[int]) -> None:
    tensors, lengths = _minibatch()
    denominator = lengths.sum().item()
    trained = [tensors[name] for name in ("log_probs", "entropy", "values")]
    whole = _all_terms(tensors, slice(0, 8), 12, denominator)
    expected = torch.autograd.grad(whole.loss, trained)

    parts, start = [], 0
    for size in cuts:
        rows = slice(start, start + size)
        # A micro-batch is padded to its own longest row only.
        parts.append(_all_terms(tensors, rows, max(1, int(lengths[rows].max())), denominator))
        start += size
    loss = sum(part.loss for part in parts)
    assert loss.item() == pytest.approx(whole.loss.item(), rel=1e-12)
    for got, want in zip(torch.autograd.grad(loss, trained), expected):
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-14)
    sums = add_metric_sums([part.metric_sums for part in parts])
    count = sum(part.count.item() for part in parts)
    assert count == denominator
    metrics = mean_metrics(whole.metric_sums, whole.count)
    assert mean_metrics(sums, count) == {name: pytest.approx(value, rel=1e-9) for name, value in metrics.items()}
    assert metrics["actor/pg_loss"] == pytest.approx(
        policy_loss(
            *(tensors[n] for n in ("log_probs", "old_log_probs", "advantages", "mask")), 0.2, 3.0, denominator
        ).loss.item()
    )


def test_what_lies_on_padding_is_without_effect() -> None:
    tensors, _ = _minibatch()
    spoiled = {}
    for name, value in tensors.items():
        fill = False if name == "mask" else 1e3
        spoiled[name] = torch.where(tensors["mask"], value.detach(), torch.tensor(fill, dtype=value.dtype))
    clean = _all_terms(tensors, slice(0, 8), 12, 42.0)
    dirty = _all_terms(spoiled, slice(0, 8), 12, 42.0)
    assert clean.loss.item() == dirty.loss.item()
    assert all(torch.equal(clean.metric_sums[name], dirty.metric_sums[name]) for name in clean.metric_sums)

"""Engine against trainer: figures, truncated importance weights and what they do to the policy loss, by hand."""

import math

import pytest
import torch

from hetero_ppo.algorithms.losses import mean_metrics, policy_loss
from hetero_ppo.algorithms.rollout_correction import mismatch_metrics, truncated_weights
from hetero_ppo.config.schema import CorrectionLevel

#: Trainer's probabilities over the engine's; the last column is no response token.
RATIOS = torch.tensor([[1.0, 4.0, 0.5, 99.0], [0.5, 2.0, 1.5, 99.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True, False], [True, True, True, False]])
ENGINE = torch.full_like(RATIOS, 0.2).log()
TRAINER = ENGINE + RATIOS.log()


def test_mismatch_by_hand() -> None:
    metrics = mismatch_metrics(TRAINER, ENGINE, MASK)
    ratios = [1.0, 4.0, 0.5, 0.5, 2.0, 1.5]
    assert metrics == {
        "rollout/log_prob_diff_mean": pytest.approx(sum(abs(math.log(r)) for r in ratios) / 6),
        "rollout/log_prob_diff_max": pytest.approx(math.log(4)),
        "rollout/ratio_outside_share": pytest.approx(5 / 6),
        "rollout/mismatch_kl": pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / 6),
    }


@pytest.mark.parametrize(
    ("ratio", "outside"), [(0.9899, 1), (0.9901, 0), (1.0099, 0), (1.0101, 1), (math.nan, 1), (math.inf, 1)]
)
def test_a_ratio_is_outside_beyond_one_percent(ratio: float, outside: int) -> None:
    trainer = torch.tensor([[ratio]]).log()
    metrics = mismatch_metrics(trainer, torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))
    assert metrics["rollout/ratio_outside_share"] == outside


def test_mismatch_kl_is_that_of_the_engine_to_the_trainer() -> None:
    """Samples in the engine's proportions: the mean of k3 is the exact KL."""
    engine, trainer = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.5, 0.3, 0.2])
    tokens = torch.tensor([[0] * 6 + [1] * 3 + [2]])
    metrics = mismatch_metrics(trainer.log()[tokens], engine.log()[tokens], torch.ones_like(tokens, dtype=torch.bool))
    exact = (engine.double() * (engine.double() / trainer.double()).log()).sum().item()
    assert metrics["rollout/mismatch_kl"] == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(
    ("level", "weights", "clipped"),
    [
        (CorrectionLevel.token, [[1.0, 2.0, 0.5, 0.0], [0.5, 2.0, 1.5, 0.0]], 1 / 6),
        # The products are 2, which is not above the cap, and 1.5.
        (CorrectionLevel.sequence, [[2.0, 2.0, 2.0, 0.0], [1.5, 1.5, 1.5, 0.0]], 0.0),
    ],
)
def test_weights_by_hand(level: CorrectionLevel, weights: list[list[float]], clipped: float) -> None:
    cap = 2.0 + 1e-12  # 2 in the logarithm and back may come out a bit above it
    got, metrics = truncated_weights(TRAINER, ENGINE, MASK, level, cap)
    assert got.tolist() == [pytest.approx(row) for row in weights]
    assert metrics["actor/tis_weight_mean"] == pytest.approx(sum(map(sum, weights)) / 6)
    assert metrics["actor/tis_clipped_share"] == pytest.approx(clipped)


def test_a_sequence_above_the_cap_is_truncated_as_a_whole() -> None:
    weights, metrics = truncated_weights(TRAINER, ENGINE, MASK, CorrectionLevel.sequence, 1.75)
    assert weights.tolist() == [pytest.approx([1.75] * 3 + [0]), pytest.approx([1.5] * 3 + [0])]
    assert metrics["actor/tis_clipped_share"] == 0.5


def test_a_ratio_that_overflows_is_truncated() -> None:
    weights, _ = truncated_weights(
        torch.tensor([[0.0, 0.0]]),
        torch.tensor([[-500.0, 0.0]]),
        torch.tensor([[True, True]]),
        CorrectionLevel.token,
        2.0,
    )
    assert weights.tolist() == [[2.0, 1.0]]


@pytest.mark.parametrize("level", list(CorrectionLevel))
def test_equal_log_probs_change_no_bit_of_loss_and_gradient(level: CorrectionLevel) -> None:
    torch.manual_seed(0)
    mask = torch.rand(4, 7) < 0.7
    old, advantages = -torch.rand(4, 7), torch.randn(4, 7)
    weights, metrics = truncated_weights(old, old.clone(), mask, level, 1.0)
    assert metrics == {"actor/tis_weight_mean": 1.0, "actor/tis_clipped_share": 0.0}
    results = []
    for given in (None, weights):
        log_probs = (old + 0.3 * torch.linspace(-1, 1, 28).view(4, 7)).requires_grad_()
        loss = policy_loss(log_probs, old, advantages, mask, 0.2, 3.0, 5.0, given)
        loss.loss.backward()
        results.append((loss.loss, log_probs.grad, mean_metrics(loss.metric_sums, loss.count)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]


def test_weights_scale_the_loss_and_gradient_of_each_token() -> None:
    """At ratio 1 the gradient of a token is -A; the weight multiplies it, and has no gradient of its own."""
    old = TRAINER.clone().requires_grad_()
    weights, _ = truncated_weights(old, ENGINE, MASK, CorrectionLevel.token, 2.0)
    assert not weights.requires_grad
    log_probs = TRAINER.clone().requires_grad_()
    advantages = torch.tensor([[1.0, -2.0, 3.0, 7.0], [2.0, 2.0, 2.0, 7.0]], dtype=torch.float64)
    result = policy_loss(log_probs, TRAINER, advantages, MASK, 0.2, None, 1.0, weights)
    result.loss.backward()
    expected = [[-1.0, 4.0, -1.5, 0.0], [-1.0, -4.0, -3.0, 0.0]]
    assert log_probs.grad.tolist() == [pytest.approx(row) for row in expected]
    assert result.loss.item() == pytest.approx(sum(map(sum, expected)))
    assert mean_metrics(result.metric_sums, result.count)["actor/pg_loss"] == pytest.approx(-6.5 / 6)


def test_gradient_against_finite_differences() -> None:
    torch.manual_seed(1)
    old, advantages = -torch.rand(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    mask = torch.ones(3, 4, dtype=torch.bool)
    weights, _ = truncated_weights(old, old - 0.5 * torch.randn_like(old), mask, CorrectionLevel.sequence, 2.0)
    log_probs = (old + 0.4 * torch.randn_like(old)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, old, advantages, mask, 0.2, 3.0, 12.0, weights).loss, log_probs
    )


def test_the_corrected_gradient_is_that_of_samples_from_the_trainer() -> None:
    """One step, three tokens: the engine's expectation of w A grad log pi is the trainer's of A grad log pi, unless truncated."""
    engine = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    trainer = torch.tensor([0.5, 0.35, 0.15], dtype=torch.float64)
    advantages = torch.tensor([[1.0, -1.0, 2.0]], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    weights, _ = truncated_weights(trainer.log()[None], engine.log()[None], mask, CorrectionLevel.token, 2.0)
    logits = trainer.log().requires_grad_()
    log_probs = logits.log_softmax(0)[None]
    corrected = policy_loss(log_probs, trainer.log()[None], advantages * engine, mask, 0.2, None, 1.0, weights).loss
    expected = policy_loss(log_probs, trainer.log()[None], advantages * trainer, mask, 0.2, None, 1.0).loss
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (corrected, expected)]
    assert gradients[0].tolist() == pytest.approx(gradients[1].tolist())

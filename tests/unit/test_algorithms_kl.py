"""KL estimators and controllers."""

import math

import pytest
import torch

from hetero_ppo.algorithms.kl import K3_PLUS, AdaptiveKlController, FixedKlController, build_kl_controller, kl_estimate
from hetero_ppo.config.schema import KlConfig, KlController, KlEstimator


def test_estimators_by_hand() -> None:
    # policy / reference = 2 and 1/2
    log_probs, ref_log_probs = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.4, 0.4]]).log()
    log2 = math.log(2.0)
    assert kl_estimate(log_probs, ref_log_probs, KlEstimator.k1, clamp=None)[0].tolist() == pytest.approx([log2, -log2])
    assert kl_estimate(log_probs, ref_log_probs, KlEstimator.k2, clamp=None)[0].tolist() == pytest.approx(
        [log2**2 / 2] * 2
    )
    k3 = [0.5 - 1 + log2, 2 - 1 - log2]
    assert kl_estimate(log_probs, ref_log_probs, KlEstimator.k3, clamp=None)[0].tolist() == pytest.approx(k3)


def test_k1_and_k3_are_unbiased_and_k2_is_close() -> None:
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.45, 0.25, 0.3], dtype=torch.float64)
    exact = (policy * (policy / reference).log()).sum().item()
    expectation = {
        e: (policy * kl_estimate(policy.log(), reference.log(), e, clamp=None)).sum().item() for e in KlEstimator
    }
    assert expectation[KlEstimator.k1] == pytest.approx(exact, rel=1e-12)
    assert expectation[KlEstimator.k3] == pytest.approx(exact, rel=1e-12)
    assert expectation[KlEstimator.k2] == pytest.approx(exact, rel=0.2)


def test_k3_saturates_where_the_policy_has_ruled_a_token_out() -> None:
    log_probs = torch.tensor([-1000.0, -1.0], requires_grad=True)
    kl = kl_estimate(log_probs, torch.tensor([-1.0, -1000.0]), KlEstimator.k3, clamp=None)
    kl.sum().backward()
    assert kl[0].item() == pytest.approx(math.exp(20) - 21, rel=1e-6)
    assert kl[1].item() == pytest.approx(998.0)  # the linear side is not clamped
    assert log_probs.grad.tolist() == pytest.approx([0.0, 1.0])


def test_k3_plus_has_the_value_of_k3_and_the_gradient_of_k2() -> None:
    log_probs = torch.tensor([-1.0, -3.0, -0.5, -30.0], requires_grad=True)
    ref_log_probs = torch.tensor([-1.0, -1.0, -2.5, -1.0])
    kl = kl_estimate(log_probs, ref_log_probs, K3_PLUS, clamp=10.0)
    assert torch.equal(kl, kl_estimate(log_probs, ref_log_probs, KlEstimator.k3, clamp=10.0))
    kl.sum().backward()
    assert log_probs.grad.tolist() == pytest.approx([0.0, -2.0, 2.0, -29.0])  # beyond the clamp too


@pytest.mark.parametrize(
    ("estimator", "clamp", "values", "gradients"),
    [  # log(policy / reference) = -3, -1, 0.5, 4
        ("k1", 2.0, [-2.0, -1.0, 0.5, 2.0], [0.0, 1.0, 1.0, 0.0]),
        ("k2", 2.0, [2.0, 0.5, 0.125, 2.0], [0.0, -1.0, 0.5, 0.0]),
        ("k3", 2.0, [2.0, math.e - 2, math.exp(-0.5) - 0.5, 2.0], [0.0, 1 - math.e, 1 - math.exp(-0.5), 0.0]),
        ("k3", None, [math.exp(3) - 4, math.e - 2, math.exp(-0.5) - 0.5, math.exp(-4) + 3], None),
        ("k1", None, [-3.0, -1.0, 0.5, 4.0], [1.0] * 4),
    ],
)
def test_the_clamp_bounds_every_estimate_and_stops_its_gradient(
    estimator: str, clamp: float | None, values: list[float], gradients: list[float] | None
) -> None:
    log_probs = torch.tensor([-4.0, -2.0, -0.5, 3.0], requires_grad=True)
    kl = kl_estimate(log_probs, torch.full((4,), -1.0), KlEstimator[estimator], clamp)
    assert kl.tolist() == pytest.approx(values)
    kl.sum().backward()
    assert gradients is None or log_probs.grad.tolist() == pytest.approx(gradients)


def test_adaptive_controller_by_hand() -> None:
    controller = AdaptiveKlController(coef=0.1, target=6.0, horizon=1000)
    controller.update(current_kl=6.6, num_samples=100)  # error 0.1, under the bound
    assert controller.coef == pytest.approx(0.1 * 1.01)
    controller = AdaptiveKlController(coef=0.1, target=6.0, horizon=1000)
    controller.update(current_kl=60.0, num_samples=100)  # clipped to 0.2
    assert controller.coef == pytest.approx(0.1 * 1.02)
    controller.update(current_kl=-1.0, num_samples=100)  # clipped to -0.2
    assert controller.coef == pytest.approx(0.1 * 1.02 * 0.98)


def test_adaptive_controller_holds_the_target_of_a_simple_plant() -> None:
    """KL falls as the coefficient grows: KL = 1 / coef. The controller has to find coef = 1 / target."""
    controller = AdaptiveKlController(coef=0.05, target=4.0, horizon=500)
    for _ in range(400):
        controller.update(1.0 / controller.coef, num_samples=64)
    assert 1.0 / controller.coef == pytest.approx(4.0, rel=1e-3)


def test_adaptive_controller_resumes() -> None:
    source = AdaptiveKlController(coef=0.1, target=6.0, horizon=1000)
    source.update(60.0, 100)
    resumed = AdaptiveKlController(coef=0.7, target=6.0, horizon=1000)
    resumed.load_state_dict(source.state_dict())
    assert resumed.coef == source.coef


def test_controllers_refuse_what_cannot_be_meant() -> None:
    with pytest.raises(ValueError, match="algorithm.kl.target"):
        AdaptiveKlController(0.1, target=0.0, horizon=10)
    with pytest.raises(ValueError, match="algorithm.kl.horizon"):
        AdaptiveKlController(0.1, target=1.0, horizon=0)
    with pytest.raises(ValueError, match="turn negative"):
        AdaptiveKlController(0.1, target=1.0, horizon=10).update(1.0, num_samples=50)
    with pytest.raises(ValueError, match="not finite"):
        AdaptiveKlController(0.1, target=1.0, horizon=1000).update(math.nan, num_samples=50)
    with pytest.raises(ValueError, match="algorithm.kl.controller"):
        FixedKlController(0.1).load_state_dict(AdaptiveKlController(0.1, 1.0, 10).state_dict())


def test_build_kl_controller_reads_the_config() -> None:
    fixed = build_kl_controller(KlConfig(coef=0.3))
    fixed.update(100.0, 1000)
    assert isinstance(fixed, FixedKlController) and fixed.coef == 0.3
    adaptive = build_kl_controller(KlConfig(controller=KlController.adaptive, coef=0.3, target=2.0, horizon=7))
    assert isinstance(adaptive, AdaptiveKlController)
    assert (adaptive.coef, adaptive.target, adaptive.horizon) == (0.3, 2.0, 7)

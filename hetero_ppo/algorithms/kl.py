"""Per-token estimates of KL(policy || reference), and the controllers of the KL penalty's weight."""

from __future__ import annotations

import math

from torch import Tensor

from hetero_ppo.config.schema import KlConfig, KlController, KlEstimator

#: log(reference / policy) above which k3 saturates: exp(20) = 4.9e8 is far from float32's overflow at exp(88).
K3_MAX_LOG_RATIO = 20.0

#: Bound on the relative error that one update of the adaptive controller sees (Ziegler et al. 2019, section 2.2).
MAX_RELATIVE_ERROR = 0.2


#: The value of k3 with the gradient of k2.
K3_PLUS = KlEstimator["k3+"]


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, estimator: KlEstimator, clamp: float | None) -> Tensor:
    """Estimate KL(policy || reference) of each token from the probability of the sampled token alone.

    With r = reference / policy at a token that the policy sampled (Schulman 2020, "Approximating KL divergence"):
    ``k1 = -log r`` (unbiased, may be negative), ``k2 = (log r)^2 / 2`` (biased, not negative) and
    ``k3 = r - 1 - log r`` (unbiased, not negative).

    ``k3+`` has the value of k3 and the gradient of k2, ``-log r``, whose expectation is the gradient of the KL itself; that of k3
    is not (its expectation is the gradient of KL(reference || policy)).

    ``clamp`` bounds the estimate of a token, whatever the estimator, and there is no gradient beyond. k3+ keeps the gradient of
    k2 there: a token that has moved far is pulled back by its distance. Without a clamp, k3 grows with r, and log r is
    clamped to at most 20 so that a token which the policy has all but ruled out gives a finite number instead of an overflow.

    Args:
        log_probs: [B, T] float, log-probs of the policy, nats.
        ref_log_probs: [B, T] float, log-probs of the reference, nats.
        estimator: Value of ``algorithm.kl.estimator``.
        clamp: Largest absolute value in nats, ``algorithm.kl.clamp``; None sets no bound.

    Returns:
        [B, T] float, nats; differentiable in both inputs.
    """
    log_ratio = ref_log_probs - log_probs
    if estimator == K3_PLUS:
        gradient = 0.5 * log_ratio.square()
        return gradient + (_bounded(_k3(log_ratio), clamp) - gradient).detach()
    if estimator == KlEstimator.k1:
        estimate = -log_ratio
    elif estimator == KlEstimator.k2:
        estimate = 0.5 * log_ratio.square()
    elif estimator == KlEstimator.k3:
        estimate = _k3(log_ratio)
    else:
        raise ValueError(f"KL estimator {estimator!r} is unknown: set algorithm.kl.estimator to k1, k2, k3 or k3+")
    return _bounded(estimate, clamp)


def _k3(log_ratio: Tensor) -> Tensor:
    log_ratio = log_ratio.clamp(max=K3_MAX_LOG_RATIO)
    return log_ratio.expm1() - log_ratio


def _bounded(estimate: Tensor, clamp: float | None) -> Tensor:
    return estimate if clamp is None else estimate.clamp(-clamp, clamp)


class FixedKlController:
    """A KL coefficient that stays as configured, after a resume too."""

    def __init__(self, coef: float):
        self.coef = coef

    def update(self, current_kl: float, num_samples: int) -> None:
        """Keep the coefficient. The arguments are those of ``AdaptiveKlController.update``."""

    def state_dict(self) -> dict[str, str | float]:
        return {"controller": KlController.fixed.value, "coef": self.coef}

    def load_state_dict(self, state: dict[str, str | float]) -> None:
        """Check that the checkpoint had the same controller. The coefficient of the configuration is kept.

        Raises:
            ValueError: The checkpoint was written with another controller.
        """
        _check_controller(state, KlController.fixed)


class AdaptiveKlController:
    """Proportional controller in log space that steers the KL per sequence to a target.

    Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2:
    ``e = clip((KL - target) / target, -0.2, 0.2)``, ``coef <- coef * (1 + e * num_samples / horizon)``.

    Args:
        coef: Initial coefficient.
        target: KL per sequence, nats, above 0.
        horizon: Number of samples over which the coefficient moves by its own size when the error is 1.
    """

    def __init__(self, coef: float, target: float, horizon: int):
        if target <= 0:
            raise ValueError(f"algorithm.kl.target is {target}: the adaptive KL controller needs a target above 0 nats")
        if horizon <= 0:
            raise ValueError(f"algorithm.kl.horizon is {horizon}: the adaptive KL controller needs at least 1 sample")
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def update(self, current_kl: float, num_samples: int) -> None:
        """Move the coefficient after one rollout batch.

        Args:
            current_kl: Mean KL per sequence of the batch, nats.
            num_samples: Number of responses in the batch, over all ranks.

        Raises:
            ValueError: The KL is not finite, or the batch is so large for the horizon (5 times or more) that the
                coefficient could turn negative.
        """
        if not math.isfinite(current_kl):
            raise ValueError(f"the KL per sequence is {current_kl}: policy or reference log-probs are not finite")
        if num_samples * MAX_RELATIVE_ERROR >= self.horizon:
            raise ValueError(
                f"algorithm.kl.horizon is {self.horizon} samples, and one PPO step has {num_samples}: the KL "
                f"coefficient could turn negative. Set it above {int(num_samples * MAX_RELATIVE_ERROR)}"
            )
        error = current_kl / self.target - 1.0
        error = min(max(error, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
        self.coef *= 1.0 + error * num_samples / self.horizon

    def state_dict(self) -> dict[str, str | float]:
        return {"controller": KlController.adaptive.value, "coef": self.coef}

    def load_state_dict(self, state: dict[str, str | float]) -> None:
        """Take the coefficient of a checkpoint; target and horizon stay as configured.

        Raises:
            ValueError: The checkpoint was written with another controller.
        """
        _check_controller(state, KlController.adaptive)
        self.coef = float(state["coef"])


def build_kl_controller(config: KlConfig) -> FixedKlController | AdaptiveKlController:
    """Return the controller that ``algorithm.kl`` asks for."""
    if config.controller == KlController.adaptive:
        return AdaptiveKlController(config.coef, config.target, config.horizon)
    return FixedKlController(config.coef)


def _check_controller(state: dict[str, str | float], expected: KlController) -> None:
    if state["controller"] != expected.value:
        raise ValueError(
            f"the checkpoint's KL controller is {state['controller']!r}, algorithm.kl.controller is "
            f"{expected.value!r}: resume with the controller that wrote the checkpoint"
        )

"""The difference between the generator's policy and the trainer's, and importance weights that correct for it.

The generator samples, the trainer differentiates. In exact arithmetic both compute the same log-probs from the same weights. Other
kernels, another dtype, another order of sums or weights of another step make them differ. Then the samples of the policy gradient
come from another policy.
"""

from __future__ import annotations

from torch import Tensor

from hetero_ppo.algorithms.kl import kl_estimate
from hetero_ppo.algorithms.masking import masked_mean
from hetero_ppo.config.schema import CorrectionLevel, KlEstimator

#: A token's ratio trainer / generator counts as outside when it leaves [1 - RATIO_MARGIN, 1 + RATIO_MARGIN].
RATIO_MARGIN = 0.01


def mismatch_metrics(old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor) -> dict[str, float]:
    """Measure how far the trainer's log-probs are from the generator's, over the response tokens.

    Args:
        old_log_probs: [B, T] float, nats, log-probs of the trainer before any update.
        rollout_log_probs: [B, T] float, nats, log-probs of the generator, in the distribution it sampled from.
        mask: [B, T] bool, True for at least one token.

    Returns:
        rollout/log_prob_diff_mean and _max, of ``|old - rollout|`` in nats; rollout/ratio_outside_share, the share of tokens
        whose ``exp(old - rollout)`` leaves [0.99, 1.01]; rollout/mismatch_kl, the mean k3 estimate of
        KL(generator || trainer) in nats per token (Schulman 2020, "Approximating KL divergence"). A NaN counts as outside.
    """
    trainer, generator = old_log_probs[mask].double(), rollout_log_probs[mask].double()
    difference = trainer - generator
    inside = (difference.exp() - 1).abs() <= RATIO_MARGIN
    return {
        "rollout/log_prob_diff_mean": float(difference.abs().mean()),
        "rollout/log_prob_diff_max": float(difference.abs().max()),
        "rollout/ratio_outside_share": float((~inside).double().mean()),
        "rollout/mismatch_kl": float(kl_estimate(generator, trainer, KlEstimator.k3, clamp=None).mean()),
    }


def truncated_weights(
    old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor, level: CorrectionLevel, cap: float
) -> tuple[Tensor, dict[str, float]]:
    """Return truncated importance weights of the trainer's policy against the generator's.

    ``w = min(pi_old / pi_generator, cap)`` per token (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training"; the truncation bounds the variance as in Espeholt et al. 2018, "IMPALA", section 4.1). With
    ``level`` sequence, the ratio is the product over the response, truncated after that: unbiased where nothing is truncated,
    at a variance that grows with the length; per token it is biased and quiet.

    Args:
        old_log_probs: [B, T] float, nats, log-probs of the trainer before any update.
        rollout_log_probs: [B, T] float, nats, log-probs of the generator.
        mask: [B, T] bool, the tokens of the losses.
        level: Unit of a ratio: token or sequence.
        cap: Largest weight C, at least 1.

    Returns:
        [B, T] weights without a graph, 0 outside the mask, and exactly 1 where the log-probs agree; and the metrics
        actor/tis_weight_mean and actor/tis_clipped_share (of tokens whose ratio was above the cap).
    """
    log_ratio = (old_log_probs - rollout_log_probs).detach().masked_fill(~mask, 0)
    if level is CorrectionLevel.sequence:
        log_ratio = log_ratio.sum(dim=1, keepdim=True).expand_as(log_ratio)
    ratio = log_ratio.exp()  # an overflow to infinity is truncated like any other
    weights = ratio.clamp(max=cap).masked_fill(~mask, 0)
    metrics = {
        "actor/tis_weight_mean": float(masked_mean(weights.double(), mask)),
        "actor/tis_clipped_share": float(masked_mean((ratio > cap).double(), mask)),
    }
    return weights, metrics

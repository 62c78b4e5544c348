"""The losses of PPO, SFT and the reward model.

Every loss is a sum over the tokens (or pairs) of this micro-batch divided by ``denominator``, the number of tokens
(or pairs) in the global minibatch over all ranks and micro-batches. So the sum of the micro-batches' losses over all
ranks is the minibatch's mean, and the sum of their gradients its gradient, however it is cut. An engine that divides
by the number of tokens itself passes 1.

Metrics travel as float64 sums under verl's names, with the count they are over; sums and counts of micro-batches and
ranks are added, and ``mean_metrics`` divides at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_ppo.algorithms.kl import kl_estimate
from hetero_ppo.algorithms.masking import masked_mean
from hetero_ppo.config.schema import KlEstimator

#: |log(policy / old policy)| beyond which the ratio stays constant: exp(20) = 4.9e8 cannot overflow float32.
MAX_LOG_RATIO = 20.0

#: Sums that ``mean_metrics`` turns into critic/vf_explained_var.
_EXPLAINED_VAR_PARTS = ("critic/returns", "critic/returns_sq", "critic/residual", "critic/residual_sq")


@dataclass(frozen=True)
class Loss:
    """One term of a loss. Terms over the same tokens of the same micro-batch add up with ``+``."""

    loss: Tensor  # [] float, with a graph
    count: Tensor  # [] int64, tokens (or pairs) that the sums are over
    metric_sums: dict[str, Tensor]  # verl's name -> [] float64, without a graph

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.loss + other.loss, self.count, self.metric_sums | other.metric_sums)


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_ratio: float,
    dual_clip: float | None,
    denominator: float,
    tis_weights: Tensor | None = None,
) -> Loss:
    """Return the negated clipped surrogate objective.

    Schulman et al. 2017, "Proximal Policy Optimization Algorithms", equation 7: the token's loss is
    ``max(-A ratio, -A clip(ratio, 1 - clip_ratio, 1 + clip_ratio))``. With ``dual_clip = c``, Ye et al. 2020,
    "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning" (dual-clip PPO): where A < 0 the loss is at
    most ``-c A``. The log-ratio is clamped to +-20 before the exponential. Importance weights, where given, multiply the
    token's loss after all clipping (Yao et al. 2025; ``rollout_correction.truncated_weights``).

    Args:
        log_probs: [b, t] float, log-probs of the policy being trained, with a graph.
        old_log_probs: [b, t] float, log-probs of the policy that made the rollout.
        advantages: [b, t] float.
        mask: [b, t] bool.
        clip_ratio: Epsilon, ``algorithm.clip_ratio``.
        dual_clip: Constant c > 1; None switches the dual clip off.
        denominator: Number of tokens of the global minibatch (see the module's docstring).
        tis_weights: [b, t] float without a graph; None applies no correction.

    Returns:
        The loss and actor/pg_loss (weighted, as it is minimised), actor/pg_clipfrac, actor/pg_clipfrac_lower, actor/ppo_kl, actor/ratio_mean.
        ``ppo_kl`` is the k1 estimate of KL(old || new), ``pg_clipfrac`` the share of tokens whose clipped term is the
        larger, ``pg_clipfrac_lower`` that of tokens which the dual clip bounds.

    Raises:
        ValueError: ``denominator`` is not positive.
    """
    _check_denominator(denominator)
    log_ratio = (log_probs - old_log_probs).masked_fill(~mask, 0)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_ratio, 1.0 + clip_ratio)
    surrogate = torch.maximum(unclipped, clipped)
    token_loss, bounded = surrogate, torch.zeros_like(mask)
    if dual_clip is not None:
        bound = -dual_clip * advantages
        negative = advantages < 0
        bounded = negative & (surrogate > bound)
        token_loss = torch.where(negative, torch.minimum(surrogate, bound), surrogate)
    if tis_weights is not None:
        token_loss = token_loss * tis_weights
    return _with_sums(
        masked_mean(token_loss, mask, denominator),
        mask,
        {
            "actor/pg_loss": token_loss,
            "actor/pg_clipfrac": clipped > unclipped,
            "actor/pg_clipfrac_lower": bounded,
            "actor/ppo_kl": -log_ratio,
            "actor/ratio_mean": ratio,
        },
    )


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    value_clip: float | None,
    denominator: float,
) -> Loss:
    """Return half the squared error of the critic, clipped as in PPO's reference implementation.

    With ``V_clip = clip(V, V_old - value_clip, V_old + value_clip)`` the token's loss is
    ``max((V - R)^2, (V_clip - R)^2) / 2`` (openai/baselines ppo2; Engstrom et al. 2020, "Implementation Matters in Deep
    Policy Gradients").

    Args:
        values: [b, t] float, values of the critic being trained, with a graph.
        old_values: [b, t] float, values of the critic before this PPO step.
        returns: [b, t] float.
        mask: [b, t] bool.
        value_clip: |V - V_old| beyond which the clipped value counts; None switches it off.
        denominator: Number of tokens of the global minibatch (see the module's docstring).

    Returns:
        The loss and critic/vf_loss, critic/vf_clipfrac, critic/vpred_mean, and the parts from which ``mean_metrics``
        makes critic/vf_explained_var and critic/returns/mean. Explained variance, ``1 - var(R - V_old) / var(R)``, is
        of the values that made the advantages, so that its parts do not depend on the minibatch's place in the epoch.

    Raises:
        ValueError: ``denominator`` is not positive.
    """
    _check_denominator(denominator)
    squared_error = (values - returns).square()
    token_loss, bounded = squared_error, torch.zeros_like(mask)
    if value_clip is not None:
        clipped_values = values.clamp(old_values - value_clip, old_values + value_clip)
        clipped_error = (clipped_values - returns).square()
        bounded = clipped_error > squared_error
        token_loss = torch.maximum(squared_error, clipped_error)
    token_loss = 0.5 * token_loss
    wide_returns = returns.double()
    residual = wide_returns - old_values
    return _with_sums(
        masked_mean(token_loss, mask, denominator),
        mask,
        {
            "critic/vf_loss": token_loss,
            "critic/vf_clipfrac": bounded,
            "critic/vpred_mean": values,
            "critic/returns": wide_returns,
            "critic/returns_sq": wide_returns.square(),
            "critic/residual": residual,
            "critic/residual_sq": residual.square(),
        },
    )


def entropy_bonus(entropy: Tensor, mask: Tensor, entropy_coef: float, denominator: float) -> Loss:
    """Return ``-entropy_coef * mean(entropy)`` (Schulman et al. 2017, equation 9) with the metric actor/entropy.

    Args:
        entropy: [b, t] float, nats, entropy of the policy's distribution over the vocabulary.
        mask: [b, t] bool.
        entropy_coef: Weight of the bonus. With 0 the loss is 0 without a graph, and only the metric is of use.
        denominator: Number of tokens of the global minibatch.

    Raises:
        ValueError: ``denominator`` is not positive.
    """
    _check_denominator(denominator)
    differentiable = entropy if entropy_coef else entropy.detach()  # spares the backward over the vocabulary
    loss = -entropy_coef * masked_mean(differentiable, mask, denominator)
    return _with_sums(loss, mask, {"actor/entropy": entropy})


def kl_loss(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    mask: Tensor,
    estimator: KlEstimator,
    clamp: float | None,
    kl_loss_coef: float,
    denominator: float,
) -> Loss:
    """Return ``kl_loss_coef * mean(KL estimate)`` (Shao et al. 2024, "DeepSeekMath", equation 4) with the metric actor/kl_loss.

    Args:
        log_probs: [b, t] float, log-probs of the policy being trained, with a graph.
        ref_log_probs: [b, t] float.
        mask: [b, t] bool.
        estimator: Estimator of ``kl_estimate``. The gradient of k1 is 0 in expectation, so it regularises nothing here.
        clamp: Bound of ``kl_estimate``.
        kl_loss_coef: Weight of the loss; the metric does not contain it.
        denominator: Number of tokens of the global minibatch.

    Raises:
        ValueError: ``denominator`` is not positive.
    """
    _check_denominator(denominator)
    kl = kl_estimate(log_probs.masked_fill(~mask, 0), ref_log_probs.masked_fill(~mask, 0), estimator, clamp)
    loss = kl_loss_coef * masked_mean(kl, mask, denominator)
    return _with_sums(loss, mask, {"actor/kl_loss": kl})


def bradley_terry_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, margin: float, score_l2: float, denominator: float
) -> Loss:
    """Return ``-log sigmoid(chosen - rejected - margin)`` per pair, plus a penalty on squared scores.

    Ouyang et al. 2022, "Training language models to follow instructions with human feedback", equation 1; the margin
    as in Touvron et al. 2023, "Llama 2", equation 2.

    Args:
        chosen_scores: [b] float, with a graph.
        rejected_scores: [b] float, with a graph.
        margin: Score difference between chosen and rejected that the loss asks for.
        score_l2: Weight of the mean of squared scores, over both sides.
        denominator: Number of pairs of the global minibatch.

    Returns:
        The loss and rm/loss (Bradley-Terry alone), rm/accuracy (a tie is a miss), rm/score_margin, rm/chosen_score,
        rm/rejected_score.

    Raises:
        ValueError: ``denominator`` is not positive.
    """
    _check_denominator(denominator)
    difference = chosen_scores - rejected_scores
    pair_loss = -F.logsigmoid(difference - margin)
    loss = pair_loss.sum() / denominator
    if score_l2:
        loss = loss + score_l2 * (chosen_scores.square() + rejected_scores.square()).sum() / (2.0 * denominator)
    return _with_sums(
        loss,
        torch.ones_like(difference, dtype=torch.bool),
        {
            "rm/loss": pair_loss,
            "rm/accuracy": difference > 0,
            "rm/score_margin": difference,
            "rm/chosen_score": chosen_scores,
            "rm/rejected_score": rejected_scores,
        },
    )


def sft_loss(log_probs: Tensor, mask: Tensor, denominator: float) -> Loss:
    """Return the negative log-likelihood of answer tokens with the metric sft/loss.

    Args:
        log_probs: [b, t] float, log-probs of the data's tokens, with a graph.
        mask: [b, t] bool, True where a column predicts a token of an answer.
        denominator: Number of answer tokens of the global minibatch.

    Raises:
        ValueError: ``denominator`` is not positive.
    """
    _check_denominator(denominator)
    return _with_sums(-masked_mean(log_probs, mask, denominator), mask, {"sft/loss": -log_probs})


def add_metric_sums(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Add the sums of micro-batches or minibatches, name by name."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total


def mean_metrics(metric_sums: Mapping[str, Tensor | float], count: Tensor | float) -> dict[str, float]:
    """Divide sums by their count; the parts of explained variance become critic/vf_explained_var.

    Args:
        metric_sums: Name -> sum over all ranks and micro-batches.
        count: Number of tokens (or pairs) that the sums are over.

    Returns:
        Name -> mean. NaN where nothing was counted; explained variance is NaN too where all returns are equal.
    """
    number = float(count)
    means = {name: float(total) / number if number else math.nan for name, total in metric_sums.items()}
    if _EXPLAINED_VAR_PARTS[0] in means:
        returns, returns_sq, residual, residual_sq = (means.pop(name) for name in _EXPLAINED_VAR_PARTS)
        returns_var = returns_sq - returns**2
        # float64 leaves about 1e-16 of the mean square in a difference that is 0.
        known = returns_var > 1e-12 * returns_sq
        means["critic/vf_explained_var"] = 1.0 - (residual_sq - residual**2) / returns_var if known else math.nan
        means["critic/returns/mean"] = returns
    return means


def _with_sums(loss: Tensor, mask: Tensor, metrics: Mapping[str, Tensor]) -> Loss:
    """Return the loss with the sum of each metric over the mask, without waiting for the device."""
    with torch.no_grad():
        values = torch.stack([value.detach().double() for value in metrics.values()])
        sums = values.masked_fill_(~mask, 0).flatten(1).sum(dim=1)
        return Loss(loss, mask.sum(), dict(zip(metrics, sums.unbind(0))))


def _check_denominator(denominator: float) -> None:
    if denominator <= 0:
        raise ValueError(
            f"the minibatch has {denominator} tokens that take part in the loss: with algorithm.truncated=mask every "
            "response of it was truncated. Raise rollout.sampling.max_tokens or algorithm.minibatch_size, or set "
            "algorithm.truncated to score or penalise"
        )

"""Turns the scores of responses and of their steps into one reward per token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hetero_ppo.algorithms.masking import last_response_column
from hetero_ppo.config.schema import EnsembleScore, TruncatedResponses

#: Added to the running variance when scores are normalised: equal scores become zeros.
NORMALISE_EPS = 1e-8


class RunningMoments:
    """Count, mean and sum of squared deviations of all scores seen so far.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque 1979 (Welford's for a batch of one). Ranks stay
    equal when each merges the moments of the global batch.
    """

    def __init__(self) -> None:
        self.count = 0.0
        self.mean = 0.0
        self.m2 = 0.0  # sum of (score - mean)^2

    @property
    def var(self) -> float:
        """Population variance; 0 before the first score."""
        return self.m2 / self.count if self.count else 0.0

    def update(self, values: Tensor) -> None:
        """Merge values of any shape, all of which are on this rank."""
        if values.numel():
            values = values.double()
            mean = values.mean()
            self.merge(float(values.numel()), mean.item(), (values - mean).square().sum().item())

    def merge(self, count: float, mean: float, m2: float) -> None:
        """Merge the moments of another set of values: plain numbers that can come from another rank.

        With ``m = global_masked_moments(scores, mask, group)``: ``merge(m.count, m.mean, m.var * m.count)``.
        """
        total = self.count + count
        if total == 0:
            return
        delta = mean - self.mean
        self.mean += delta * count / total
        self.m2 += m2 + delta * delta * self.count * count / total
        self.count = total

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count = float(state["count"])
        self.mean = float(state["mean"])
        self.m2 = float(state["m2"])


def ensemble_score(scores: Tensor, how: EnsembleScore, k: float) -> Tensor:
    """Combine the scores of several reward models into one score.

    Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization" (mean, worst case, and an uncertainty-weighted
    one that subtracts the variance); Eisenstein et al. 2023, "Helping or Herding? Reward Model Ensembles Mitigate but do
    not Eliminate Reward Hacking" (mean, minimum, mean minus standard deviation). Computed in float64, rounded once.

    Args:
        scores: [M, B] float32 of M models.
        how: Value of ``reward.ensemble``.
        k: Number of population standard deviations that ``mean_minus_std`` subtracts.

    Returns:
        [B] float32.
    """
    if how == EnsembleScore.min:
        return scores.min(dim=0).values
    mean = scores.double().mean(dim=0)
    if how == EnsembleScore.mean_minus_std:
        mean = mean - k * scores.double().std(dim=0, correction=0)
    return mean.float()


def mix_scores(parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Return the sum of weight x score, computed in float64 and rounded once.

    Args:
        parts: At least one (weight, [B] float32 scores); NaN where a part has none.

    Returns:
        [B] float32, NaN where any part is.
    """
    return torch.stack([weight * scores.double() for weight, scores in parts]).sum(dim=0).float()


def normalise_scores(scores: Tensor, mean: float, var: float) -> Tensor:
    """Return ``(scores - mean) / sqrt(var + 1e-8)``, with running moments that already contain these scores.

    Args:
        scores: [B] float.
        mean: Running mean, ``RunningMoments.mean``.
        var: Running population variance, ``RunningMoments.var``.

    Returns:
        [B] in the dtype of ``scores``.
    """
    return (scores - mean) * (var + NORMALISE_EPS) ** -0.5


def clip_scores(scores: Tensor, clip: float) -> Tensor:
    """Clip scores to [-clip, clip]; 0 switches clipping off.

    Args:
        scores: [B] float.
        clip: Value of ``reward.clip``.

    Returns:
        [B] in the dtype of ``scores``.
    """
    return scores.clamp(-clip, clip) if clip > 0 else scores


def apply_truncation(
    scores: Tensor, response_mask: Tensor, truncated: Tensor, policy: TruncatedResponses, truncation_score: float
) -> tuple[Tensor, Tensor]:
    """Treat the responses that reached the length limit without an end-of-sequence token as the policy says.

    Call it after normalisation and clipping: ``truncation_score`` is a reward as the policy sees it.

    Args:
        scores: [B] float.
        response_mask: [B, T] bool.
        truncated: [B] bool.
        policy: ``score`` changes nothing; ``penalise`` replaces the score; ``mask`` takes the row out of the mask, and
            so out of losses, whitening and token counts.
        truncation_score: Value of ``algorithm.truncation_score``, which ``penalise`` reads.

    Returns:
        scores [B], response_mask [B, T].
    """
    if policy == TruncatedResponses.score:
        return scores, response_mask
    if policy == TruncatedResponses.penalise:
        return scores.masked_fill(truncated, truncation_score), response_mask
    if policy == TruncatedResponses.mask:
        return scores, response_mask & ~truncated[:, None]
    raise ValueError(f"algorithm.truncated is {policy!r}: set it to score, penalise or mask")


def token_level_rewards(
    outcome: Tensor, process: Tensor | None, kl: Tensor, response_mask: Tensor, kl_coef: float
) -> Tensor:
    """Return ``-kl_coef * kl`` on each response token, with the process scores at their tokens and the outcome score on the last one.

    Ziegler et al. 2019, equation 2, spread over the tokens; process scores as in Uesato et al. 2022, "Solving math word problems with
    process- and outcome-based feedback". A row without a True column gets zeros.

    Args:
        outcome: [B] float, normalised and clipped as configured.
        process: [B, T] float, the score of the step that ends with token t + 1, and 0 where no step ends; None: no scores of steps.
        kl: [B, T] float, nats per token (``kl_estimate``).
        response_mask: [B, T] bool.
        kl_coef: Current coefficient of the controller.

    Returns:
        [B, T] float, 0 outside ``response_mask``.
    """
    last = last_response_column(response_mask)[:, None]
    is_last = torch.arange(response_mask.shape[1], device=response_mask.device) == last
    rewards = (-kl_coef * kl).masked_fill(~response_mask, 0)
    if process is not None:
        rewards = rewards + process.to(rewards.dtype).masked_fill(~response_mask, 0)
    return rewards + outcome.to(rewards.dtype)[:, None].expand_as(rewards).masked_fill(~is_last, 0)

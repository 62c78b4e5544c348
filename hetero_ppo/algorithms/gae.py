"""Generalised advantage estimation."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from hetero_ppo.algorithms.advantages import AdvantageEstimator, AdvantageInputs, Advantages
from hetero_ppo.config.schema import AlgorithmConfig


class Gae(AdvantageEstimator):
    """Generalised advantage estimation, from the values of a critic."""

    name = "gae"
    needs_values = True

    def __init__(self, gamma: float, lam: float) -> None:
        """Take the constants.

        Args:
            gamma: Discount per token.
            lam: Lambda of the estimator.
        """
        self.gamma = gamma
        self.lam = lam

    @classmethod
    def for_run(cls, config: AlgorithmConfig) -> Self:
        """Build the estimator with ``algorithm.gamma`` and ``algorithm.lam``."""
        return cls(config.gamma, config.lam)

    def estimate(self, inputs: AdvantageInputs) -> Advantages:
        """Return advantages and the critic's TD(lambda) targets."""
        assert inputs.values is not None, "algorithm.advantage=gae was checked to have a critic"
        advantages, returns = generalized_advantages(
            inputs.token_level_rewards, inputs.values, inputs.response_mask, self.gamma, self.lam
        )
        return Advantages(advantages, returns)


@torch.no_grad()
def generalized_advantages(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns of response tokens.

    Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation", equation 16:
    ``A_t = sum_l (gamma lam)^l delta_{t+l}`` with ``delta_t = r_t + gamma V_{t+1} - V_t``. V after the last response
    token is 0, for truncated responses too. The return is ``A_t + V_t``, the TD(lambda) target of the critic.

    Args:
        token_level_rewards: [B, T] float.
        values: [B, T] float; column t is the value of the state before token t + 1.
        response_mask: [B, T] bool; the True columns of a row follow each other without a gap.
        gamma: Discount per token.
        lam: Lambda of the estimator.

    Returns:
        advantages [B, T] and returns [B, T], 0 outside ``response_mask``, without a graph.
    """
    values = values.masked_fill(~response_mask, 0)
    next_values = torch.cat([values[:, 1:], values.new_zeros(values.shape[0], 1)], dim=1)
    deltas = (token_level_rewards + gamma * next_values - values).masked_fill(~response_mask, 0)

    columns = response_mask.any(dim=0).nonzero()
    if columns.numel() == 0:
        return torch.zeros_like(values), torch.zeros_like(values)
    first, last = int(columns[0]), int(columns[-1])
    # One contiguous row of B numbers per token: each step of the recursion reads and writes whole cache lines.
    per_token = deltas[:, first : last + 1].t().contiguous()
    rows = per_token.unbind(0)
    for t in range(last - first - 1, -1, -1):
        rows[t].add_(rows[t + 1], alpha=gamma * lam)

    advantages = torch.zeros_like(values)
    advantages[:, first : last + 1] = per_token.t()
    # The recursion runs on into the prompt columns of rows whose response starts later than the earliest one.
    advantages.masked_fill_(~response_mask, 0)
    return advantages, advantages + values

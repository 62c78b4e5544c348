"""The terms of an optimizer step's loss: each has micro-batches, a weight and a denominator of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hetero_ppo.algorithms.losses import Loss, add_metric_sums, mean_metrics
from hetero_ppo.types import Microbatch

#: (model output, micro-batch) -> loss with denominator 1: a sum over the micro-batch's tokens
LossFn = Callable[[Tensor, Microbatch], Loss]


@dataclass(frozen=True)
class LossTerm:
    """One term of the loss: ``weight x (sum of its micro-batches' losses over all ranks) / denominator``."""

    microbatches: Sequence[Microbatch]  # this data-parallel rank's part, at least one
    loss_fn: LossFn  # on the last stage
    denominator: float  # tokens (or pairs) of the minibatch over all ranks; 0: it has none, and the term adds nothing
    weight: float = 1.0


@dataclass(frozen=True)
class TermResult:
    """Results of one term of an optimizer step, the same on every rank."""

    loss: float  # sum of its losses divided by its denominator, without its weight; 0 without a denominator
    count: int  # tokens, or pairs, that its metrics are over
    metric_sums: dict[str, Tensor]  # name -> [] float64, sum over them


@dataclass(frozen=True)
class TrainStepResult:
    """Results of one optimizer step, the same on every rank."""

    loss: float  # weighted sum of the terms
    grad_norm: float  # before clipping
    learning_rate: float
    terms: Sequence[TermResult]  # in the order of the step's terms
    is_skipped: bool = (
        False  # the gradient was not finite: the weights are as before, and the other figures mean nothing
    )


def num_loss_tokens(inputs: Any, rows: Sequence[int]) -> int:
    """Return the tokens of a minibatch that take part in the loss, over all ranks.

    Args:
        inputs: Record of the loss with a ``mask`` of [B, T] bool, the same on every rank.
        rows: Rows of the minibatch, over all ranks.
    """
    return int(inputs.mask[torch.as_tensor(rows)].sum())


def gradient_scales(terms: Sequence[LossTerm]) -> tuple[float, list[float]]:
    """Return the number that the step's gradients are divided by, and for each term the factor of its losses before that.

    The first term that has a denominator gives the divisor. With weight 1 its own factor is exactly 1, so a term that stands alone
    is computed as if there were no factors.

    Args:
        terms: Terms of one optimizer step.
    """
    divisor = next((term.denominator for term in terms if term.denominator > 0), 0.0)
    return divisor, [term.weight * (divisor / term.denominator) if term.denominator > 0 else 0.0 for term in terms]


def step_metrics(results: Sequence[TrainStepResult]) -> dict[str, float]:
    """Return the mean of every metric over the tokens (or pairs) of some optimizer steps with the same terms.

    Args:
        results: At least one.
    """
    metrics: dict[str, float] = {}
    for steps in zip(*(result.terms for result in results), strict=True):
        metrics |= mean_metrics(add_metric_sums(term.metric_sums for term in steps), sum(term.count for term in steps))
    return metrics

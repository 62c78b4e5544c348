"""Statistics over all ranks of a group, in float64 and in rank order: every rank gets the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Moments(NamedTuple):
    """Moments of the masked values of all ranks."""

    mean: float
    var: float  # population variance
    count: int  # type: ignore[assignment]  # hides tuple.count, which nothing calls


def global_masked_moments(values: Tensor, mask: Tensor, group: dist.ProcessGroup | None) -> Moments:
    """Return mean, population variance and number of the masked values of all ranks of a group, equal on all of them.

    Every rank computes the mean and the squared deviations of its own values. These are then combined (Chan, Golub and LeVeque 1979),
    so that a mean far from 0 costs no digits. A rank may have no masked value.

    Args:
        values: Float tensor of any shape, on a device that ``group`` can communicate from.
        mask: Bool tensor of the same shape.
        group: Ranks with different values (a data-parallel group); None: this process alone.

    Raises:
        ValueError: No rank has a masked value.
    """
    selected = values.detach()[mask].double()
    count = selected.numel()
    mean = selected.mean() if count else selected.new_zeros(())
    m2 = (selected - mean).square().sum()
    parts = _gather(torch.stack([mean.new_tensor(float(count)), mean, m2]), group)  # [ranks, 3]
    counts, means, m2s = parts.unbind(1)
    total = counts.sum()
    if total == 0:
        raise ValueError(
            "no response token takes part: the mask is empty on all ranks. With algorithm.truncated=mask every "
            "response was truncated; raise rollout.sampling.max_tokens or choose score or penalise"
        )
    mean = (counts * means).sum() / total
    var = (m2s + counts * (means - mean).square()).sum() / total
    return Moments(mean.item(), var.item(), int(total.item()))


def all_reduce_metric_sums(metric_sums: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, float]:
    """Add sums and counts over the ranks of a group, in one collective.

    Args:
        metric_sums: Name -> [] tensor, at least one; the same names on all ranks, in any order.
        group: Ranks that saw different rows (a data-parallel group); None: this process alone.

    Returns:
        Name -> sum, equal on all ranks.
    """
    names = sorted(metric_sums)
    total = _gather(torch.stack([metric_sums[name].double() for name in names]), group).sum(dim=0)
    return dict(zip(names, total.tolist()))


def _gather(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the [...] tensors of all ranks as [ranks, ...] on the CPU.

    Sums over them are in the order of ranks. An all-reduce has an order of its own.
    """
    if group is None:
        return local[None].cpu()
    parts = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(parts, local, group=group)
    return torch.stack(parts).cpu()

"""Log-probabilities and entropy from logits whose vocabulary is split over tensor-parallel ranks.

The row maximum and the sums are computed in float32 from slices of rows, so that no float32 copy of the whole
[tokens, vocabulary] tensor is ever made, forward or backward. What autograd keeps is the logits themselves, in their own
dtype, and two float32 numbers per row.

Accuracy: on bf16 logits the result is that of float32 arithmetic on those bf16 numbers (error below 1e-5 in log-prob);
what bf16 costs lies in the logits, whose rounding alone is up to 2^-9 of their size (0.03 at a logit of 16).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_bridge.aligned.rows import row_sums

#: Elements of one float32 slice: 1 MiB stays in a CPU's cache, 256 MiB fills a GPU.
_CHUNK_ELEMENTS_CPU = 1 << 18
_CHUNK_ELEMENTS_GPU = 1 << 26


def vocab_parallel_log_probs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None,
    with_entropy: bool,
    num_parts: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the log-probability of each target under ``softmax(logits / temperature)``, and the entropy of that distribution.

    Rank r of ``tp_group`` holds columns ``r * V/tp .. (r + 1) * V/tp - 1``. Columns from ``vocab_size`` on are padding:
    they take no part, and their gradient is 0. Results and gradients of the log-probs are equal on all ranks of the
    group; the gradient of the logits is each rank's own columns, without a collective.

    Logits that are not contiguous are copied, forward and backward. To leave out the last position of [B, S, V/tp], which predicts
    nothing, give it any target and slice the results, not the logits.

    Args:
        logits: [..., V/tp] bf16, fp16, float32 or float64, finite.
        targets: [...] int64, global token ids below ``vocab_size``.
        temperature: Sampling temperature of the generator, above 0. It divides the logits.
        vocab_size: True size of the vocabulary, in columns of all ranks together.
        tp_group: Tensor-parallel group of the role; None: one rank.
        with_entropy: Whether to compute the entropy too. It is differentiable. Where it is only a metric, detach it: the backward
            then does no work for it.
        num_parts: Number of equal parts of the columns. Sums are taken over each part, and then over the parts in their order, so
            that the bits do not depend on the number of ranks. It is a multiple of that number and divides the columns. None: each
            rank's columns are one part.

    Returns:
        log_probs [...] and entropy [...] (None without ``with_entropy``), float32 (float64 for float64 logits), nats.

    Raises:
        ValueError: ``temperature`` is not positive, or ``vocab_size`` does not fit the logits.
    """
    if temperature <= 0:
        raise ValueError(
            f"temperature is {temperature}: log-probs of greedy decoding do not exist. Set "
            "rollout.sampling.temperature above 0"
        )
    tp_size = 1 if tp_group is None else tp_group.size()
    if not 0 < vocab_size <= logits.shape[-1] * tp_size:
        raise ValueError(
            f"vocab_size is {vocab_size}, but the logits have {logits.shape[-1]} columns on each of {tp_size} "
            "tensor-parallel ranks: the model and the tokenizer do not belong together"
        )
    if num_parts is not None and (num_parts % tp_size or logits.shape[-1] * tp_size % num_parts):
        raise ValueError(
            f"num_parts is {num_parts}: it has to be a multiple of the {tp_size} tensor-parallel ranks and to divide the "
            f"{logits.shape[-1] * tp_size} columns; pad the vocabulary to a multiple of it"
        )
    # Without gradients (no_grad, or logits that need none) autograd drops what forward() hands it to keep.
    return _VocabParallelLogProbs.apply(logits, targets, temperature, vocab_size, tp_group, with_entropy, num_parts)


class _VocabParallelLogProbs(torch.autograd.Function):
    """Log-probs and entropy of logits that are divided over ranks, with their gradients.

    Let p = softmax(x), x = logits / temperature, y the target and H the entropy. Then
    ``d log p_y / d x_j = [j = y] - p_j`` and ``d H / d x_j = -p_j (log p_j + H)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        temperature: float,
        vocab_size: int,
        tp_group: dist.ProcessGroup | None,
        with_entropy: bool,
        num_parts: int | None,
    ) -> tuple[Tensor, Tensor | None]:
        log_probs, entropy, log_sum_exp = _forward(
            logits, targets, temperature, vocab_size, tp_group, with_entropy, num_parts
        )
        ctx.save_for_backward(logits, targets, log_sum_exp, entropy)
        ctx.temperature = temperature
        ctx.columns = _own_columns(logits.shape[-1], vocab_size, tp_group)
        ctx.set_materialize_grads(False)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Any, ...]:
        logits, targets, log_sum_exp, entropy = ctx.saved_tensors
        if grad_log_probs is None and grad_entropy is None:
            return None, None, None, None, None, None, None
        if grad_log_probs is None:
            grad_log_probs = torch.zeros_like(log_sum_exp)
        # Of log p_y and H with respect to the logits: the temperature divides once more.
        grad_log_probs = (grad_log_probs / ctx.temperature).reshape(-1, 1)
        if grad_entropy is not None:
            grad_entropy = (grad_entropy / ctx.temperature).reshape(-1, 1)
            entropy = entropy.reshape(-1, 1)
        first, num_columns = ctx.columns
        grad_logits = _backward(
            logits, targets, log_sum_exp, entropy, grad_log_probs, grad_entropy, ctx.temperature, first, num_columns
        )
        return grad_logits, None, None, None, None, None, None


def _forward(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None,
    with_entropy: bool,
    num_parts: int | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return log_probs [...], entropy [...] or None, and the log of the softmax denominator [...]."""
    rows = logits.detach().reshape(-1, logits.shape[-1])
    first, num_columns = _own_columns(rows.shape[1], vocab_size, tp_group)
    rows, flat_targets = rows[:, :num_columns], targets.reshape(-1)
    if num_parts is not None:
        tp_size = 1 if tp_group is None else tp_group.size()
        part = logits.shape[-1] * tp_size // num_parts
        parts = [rows[:, start : start + part] for start in range(0, logits.shape[-1], part)]
        results = _part_rows(parts, flat_targets - first, temperature, tp_group, with_entropy)
    elif tp_group is None or tp_group.size() == 1:
        results = _one_rank_rows(rows, flat_targets, temperature, with_entropy)
    else:
        results = _split_rows(rows, flat_targets - first, temperature, tp_group, with_entropy)
    log_probs, log_sum_exp, entropy = results
    return (
        log_probs.view(targets.shape),
        None if entropy is None else entropy.view(targets.shape),
        log_sum_exp.view(targets.shape),
    )


def _one_rank_rows(
    rows: Tensor, targets: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return log_probs, log of the softmax denominator and entropy, each [N, 1], for rows [N, V] and targets [N]."""
    targets = targets[:, None]
    log_probs = torch.empty(rows.shape[0], 1, dtype=_compute_dtype(rows), device=rows.device)
    log_sum_exp = torch.empty_like(log_probs)
    entropy = torch.empty_like(log_probs) if with_entropy else None
    for rows_of in _row_slices(rows):
        scaled = _scaled(rows[rows_of], temperature)
        log_softmax = torch.log_softmax(scaled, dim=-1)
        target = targets[rows_of]
        torch.gather(log_softmax, 1, target, out=log_probs[rows_of])
        torch.sub(scaled.gather(1, target), log_probs[rows_of], out=log_sum_exp[rows_of])
        if entropy is not None:
            entropy[rows_of] = -log_softmax.exp().mul_(log_softmax).sum(dim=-1, keepdim=True)
    return log_probs, log_sum_exp, entropy


def _split_rows(
    rows: Tensor, targets: Tensor, temperature: float, tp_group: dist.ProcessGroup, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what ``_one_rank_rows`` does, each [N], for one rank's columns. Two collectives.

    Args:
        rows: [N, columns], logits of this rank's columns without padding.
        targets: [N] int64, counted from this rank's first column.
        temperature: Sampling temperature.
        tp_group: Tensor-parallel group.
        with_entropy: Whether to compute the entropy.
    """
    num_rows, num_columns = rows.shape
    dtype = _compute_dtype(rows)
    if num_columns:
        row_max = rows.amax(dim=1).to(dtype) / temperature
    else:  # a rank that holds nothing but padding
        row_max = torch.full((num_rows,), -torch.inf, dtype=dtype, device=rows.device)
    dist.all_reduce(row_max, op=dist.ReduceOp.MAX, group=tp_group)

    # sum of exp(x - max), x_target - max, and for the entropy sum of exp(x - max) (x - max)
    sums = torch.zeros(3 if with_entropy else 2, num_rows, dtype=dtype, device=rows.device)
    if num_columns:
        owned = (targets >= 0) & (targets < num_columns)
        columns = targets.clamp(0, num_columns - 1)[:, None]
        for rows_of in _row_slices(rows):
            shifted = _scaled(rows[rows_of], temperature) - row_max[rows_of, None]
            sums[1, rows_of] = shifted.gather(1, columns[rows_of]).squeeze(1).masked_fill_(~owned[rows_of], 0)
            exp = shifted.exp()
            sums[0, rows_of] = exp.sum(dim=1)
            if with_entropy:
                sums[2, rows_of] = exp.mul_(shifted).sum(dim=1)
    dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=tp_group)
    log_sum = sums[0].log()
    entropy = log_sum - sums[2] / sums[0] if with_entropy else None
    return sums[1] - log_sum, row_max + log_sum, entropy


def _part_rows(
    parts: list[Tensor], targets: Tensor, temperature: float, tp_group: dist.ProcessGroup | None, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what ``_split_rows`` does. Sums are taken over each of this rank's parts [N, columns], then over all parts in order."""
    num_rows, dtype = targets.shape[0], _compute_dtype(parts[0])
    row_max = torch.full((num_rows,), -torch.inf, dtype=dtype, device=targets.device)
    for part in parts:
        if part.shape[1]:
            torch.maximum(row_max, part.amax(dim=1).to(dtype) / temperature, out=row_max)
    if tp_group is not None:
        dist.all_reduce(row_max, op=dist.ReduceOp.MAX, group=tp_group)
    # for each part, the sums of _split_rows
    sums = torch.zeros(len(parts), 3, num_rows, dtype=dtype, device=targets.device)
    first = 0
    for part, part_sums in zip(parts, sums):
        num_columns = part.shape[1]
        owned = (targets >= first) & (targets < first + num_columns)
        columns = (targets - first).clamp(0, max(num_columns - 1, 0))[:, None]
        first += num_columns
        for rows_of in _row_slices(part) if num_columns else []:
            shifted = _scaled(part[rows_of], temperature) - row_max[rows_of, None]
            part_sums[1, rows_of] = shifted.gather(1, columns[rows_of]).squeeze(1).masked_fill_(~owned[rows_of], 0)
            exp = shifted.exp()
            part_sums[0, rows_of] = row_sums(exp)
            if with_entropy:
                part_sums[2, rows_of] = row_sums(exp.mul_(shifted))
    if tp_group is not None and tp_group.size() > 1:
        whole = [torch.empty_like(sums) for _ in range(tp_group.size())]
        dist.all_gather(whole, sums, group=tp_group)
        sums = torch.cat(whole)
    total = sums[0]
    for part_sums in sums[1:]:
        total = total + part_sums
    log_sum = total[0].log()
    entropy = log_sum - total[2] / total[0] if with_entropy else None
    return total[1] - log_sum, row_max + log_sum, entropy


def _backward(
    logits: Tensor,
    targets: Tensor,
    log_sum_exp: Tensor,
    entropy: Tensor | None,
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
    temperature: float,
    first: int,
    num_columns: int,
) -> Tensor:
    """Return the gradient of the logits [..., V/tp] from gradients [N, 1] that are already divided by the temperature."""
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    grad_rows = grad_logits.view(-1, logits.shape[-1])
    grad_rows[:, num_columns:] = 0  # padding
    if num_columns == 0:
        return grad_logits
    rows = logits.reshape(-1, logits.shape[-1])[:, :num_columns]
    log_sum_exp = log_sum_exp.reshape(-1, 1)
    columns = targets.reshape(-1, 1) - first
    at_target = grad_log_probs.masked_fill((columns < 0) | (columns >= num_columns), 0)
    columns = columns.clamp(0, num_columns - 1)
    for rows_of in _row_slices(rows):
        result = grad_rows[rows_of, :num_columns]
        scaled = _scaled(rows[rows_of], temperature)
        work = result if result.dtype == scaled.dtype else torch.empty_like(scaled)  # holds log-softmax, then gradient
        torch.sub(scaled, log_sum_exp[rows_of], out=work)
        if grad_entropy is None:
            work.exp_().mul_(-grad_log_probs[rows_of])
        else:
            assert entropy is not None  # it was computed where it has a gradient
            weight = (work + entropy[rows_of]).mul_(-grad_entropy[rows_of]).sub_(grad_log_probs[rows_of])
            work.exp_().mul_(weight)
        work.scatter_add_(1, columns[rows_of], at_target[rows_of])
        if work is not result:
            result.copy_(work)
    return grad_logits


def _own_columns(local_columns: int, vocab_size: int, tp_group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return the first global column of this rank, and the number of its columns that are not padding."""
    first = 0 if tp_group is None else tp_group.rank() * local_columns
    return first, min(max(vocab_size - first, 0), local_columns)


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _scaled(rows: Tensor, temperature: float) -> Tensor:
    """Return the rows in the dtype of the computation, divided by the temperature; the rows themselves where neither changes them."""
    rows = rows.to(_compute_dtype(rows))
    return rows if temperature == 1.0 else rows / temperature


def _row_slices(rows: Tensor) -> list[slice]:
    elements = _CHUNK_ELEMENTS_CPU if rows.device.type == "cpu" else _CHUNK_ELEMENTS_GPU
    step = max(1, elements // max(1, rows.shape[1]))
    return [slice(start, start + step) for start in range(0, rows.shape[0], step)]

"""Cut rows into micro-batches, and put what they computed back in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from hetero_ppo.types import Microbatch, PreferenceBatch

Record = TypeVar("Record")


def select(record: Record, rows: Sequence[int], num_columns: int) -> Record:
    """The rows of every tensor of a record; tensors with two dimensions get ``num_columns`` columns, added ones 0."""
    index = torch.as_tensor(rows)
    picked: dict[str, Any] = {}
    for entry in fields(record):
        value = getattr(record, entry.name)
        if isinstance(value, Tensor):
            value = value[index]
            value = to_columns(value, num_columns) if value.dim() == 2 else value
        picked[entry.name] = value
    return type(record)(**picked)


def map_tensors(record: Record, change: Callable[[Tensor], Tensor]) -> Record:
    """The record with every tensor changed; what is None stays None."""
    return type(record)(**{name: None if value is None else change(value) for name, value in vars(record).items()})


def rank_rows(num_rows: int, rank: int, size: int) -> list[int]:
    """Rows of a data-parallel rank: contiguous, sizes that differ by at most one."""
    return list(range(num_rows * rank // size, num_rows * (rank + 1) // size))


def split(
    token_ids: Tensor,
    sequence_lengths: Tensor,
    inputs: Any,
    rows: Sequence[int],
    *,
    micro_batch_size: int,
    length_multiple: int = 1,
) -> list[tuple[list[int], Microbatch]]:
    """Micro-batches of ``rows``, each with rows of similar length and padded to its own longest.

    Args:
        token_ids: [B, S] int64, right-padded.
        sequence_lengths: [B] int64.
        inputs: a record of [B, S - 1] and [B] tensors, or None.
        rows: the rows to take.
        micro_batch_size: rows at most.
        length_multiple: the padded length is a multiple of it (sequence parallelism cuts it into equal parts).

    Returns:
        (rows, micro-batch) pairs; together they hold every row once.
    """
    ordered = sorted(rows, key=lambda row: (int(sequence_lengths[row]), row))
    result = []
    for start in range(0, len(ordered), micro_batch_size):
        taken = ordered[start : start + micro_batch_size]
        index = torch.as_tensor(taken)
        longest = int(sequence_lengths[index].max())
        longest += -longest % length_multiple
        ids = token_ids[index, :longest]
        if ids.shape[1] < longest:
            ids = pad(ids, (0, longest - ids.shape[1]))
        part = None if inputs is None else select(inputs, taken, longest - 1)
        result.append((taken, Microbatch(token_ids=ids, sequence_lengths=sequence_lengths[index], inputs=part)))
    return result


def split_pairs(
    batch: PreferenceBatch, pairs: Sequence[int], *, micro_batch_size: int, length_multiple: int = 1
) -> list[Microbatch]:
    """Micro-batches of whole pairs: rows 0..b/2 - 1 are chosen, the others rejected in the same order.

    Args:
        batch: all pairs.
        pairs: the pairs to take.
        micro_batch_size: sequences at most; at least one pair is taken.
        length_multiple: the padded length is a multiple of it.
    """
    lengths = torch.maximum(batch.chosen_lengths, batch.rejected_lengths)
    ordered = sorted(pairs, key=lambda pair: (int(lengths[pair]), pair))
    per_microbatch = max(1, micro_batch_size // 2)
    result = []
    for start in range(0, len(ordered), per_microbatch):
        index = torch.as_tensor(ordered[start : start + per_microbatch])
        longest = int(lengths[index].max())
        longest += -longest % length_multiple
        ids = torch.cat([to_columns(batch.chosen_ids[index], longest), to_columns(batch.rejected_ids[index], longest)])
        both = torch.cat([batch.chosen_lengths[index], batch.rejected_lengths[index]])
        result.append(Microbatch(token_ids=ids, sequence_lengths=both))
    return result


def with_fillers(microbatches: Sequence[Microbatch], at_least: int, length: int) -> list[Microbatch]:
    """``at_least`` so many, for forwards alone: expert layers are collective over ranks that may have fewer rows than others.

    Args:
        length: tokens of an added micro-batch.
    """
    filler = Microbatch(torch.zeros(1, length, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
    return [*microbatches, *[filler] * (at_least - len(microbatches))]


def same_shape(microbatches: Sequence[Microbatch], stages: int) -> list[Microbatch]:
    """All padded to the largest [b, s] of them, and their number to a multiple of ``stages``; what is added is masked out of
    every loss.

    Megatron-Core's interleaved schedule exchanges activations of one shape and goes round the pipeline stages in whole turns. Not
    for the training of pairs, whose loss has no mask.
    """
    b = max(m.token_ids.shape[0] for m in microbatches)
    s = max(m.token_ids.shape[1] for m in microbatches)
    padded = []
    for m in microbatches:
        rows = b - m.token_ids.shape[0]
        columns = s - m.token_ids.shape[1]
        inputs = m.inputs
        if inputs is not None:
            inputs = map_tensors(inputs, partial(pad, pad=(0, columns, 0, rows)))
        lengths = pad(m.sequence_lengths, (0, rows), value=1)
        padded.append(Microbatch(pad(m.token_ids, (0, columns, 0, rows)), lengths, inputs))
    first = padded[0]
    nothing = None
    if first.inputs is not None:
        nothing = map_tensors(first.inputs, torch.zeros_like)
    empty = Microbatch(torch.zeros_like(first.token_ids), torch.ones_like(first.sequence_lengths), nothing)
    return padded + [empty] * (-len(padded) % stages)


def to_columns(value: Tensor, num_columns: int) -> Tensor:
    """[b, t] -> [b, num_columns]: cut, or padded with zeros (the padding of length_multiple comes and goes here)."""
    if value.shape[1] >= num_columns:
        return value[:, :num_columns]
    return pad(value, (0, num_columns - value.shape[1]))

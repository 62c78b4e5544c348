"""Cutting rows into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from hetero_ppo.data.sequence_end import last_token_index
from hetero_ppo.types import Microbatch, PreferenceBatch

Record = TypeVar("Record")


@dataclass(frozen=True)
class MicrobatchSize:
    """Largest size of a micro-batch, as a number of sequences or as a number of tokens."""

    rows: int  # most sequences of a micro-batch, where tokens is None
    tokens: int | None = None  # most tokens, with padding; packed sequences have none
    packed: bool = False  # whether sequences are joined to one row without padding between them
    length_multiple: int = 1  # padded lengths are a multiple of it: sequence parallelism cuts them into equal parts
    packed_multiple: int = 1  # the number of tokens of a packed micro-batch is a multiple of it
    head_multiple: int = 1  # the head computes a multiple of it, where the micro-batch has tokens enough
    attention_multiple: int = 1  # attention that pads packed sequences pads them to a multiple of it

    def padded(self, length: int) -> int:
        """Return the padded length of a micro-batch whose longest sequence has ``length`` tokens."""
        return _up(length, self.length_multiple)

    def packed_length(self, tokens: int) -> int:
        """Return the length of a packed micro-batch of ``tokens`` tokens."""
        return _up(tokens, self.packed_multiple)


def _up(number: int, multiple: int) -> int:
    return number + -number % multiple


def deal(lengths: Sequence[int], rows: Sequence[int], ranks: int, *, even: bool) -> list[list[int]]:
    """Distribute rows over the data-parallel ranks, so that all ranks get about the same number of tokens.

    The longest remaining row goes to the rank with the fewest tokens (Graham 1969, "Bounds on multiprocessing timing anomalies"). The
    largest sum is then at most a third above the best possible one. Ties go to the lower row and the lower rank.

    Args:
        lengths: Number of tokens of every row, also of rows that are not in ``rows``.
        rows: Rows to distribute.
        ranks: Number of ranks.
        even: Whether no rank may get more than ceil(rows / ranks) rows. Micro-batches with a fixed number of rows need that.

    Returns:
        The rows of each rank in ascending order. Every rank has at least one if there are as many rows as ranks.
    """
    most = -(-len(rows) // ranks) if even else len(rows)
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        open_ranks = [rank for rank in range(ranks) if len(dealt[rank]) < most]
        rank = min(open_ranks, key=lambda rank: (tokens[rank], len(dealt[rank]), rank))
        dealt[rank].append(row)
        tokens[rank] += lengths[row]
    return [sorted(part) for part in dealt]


def cut(lengths: Sequence[int], rows: Sequence[int], size: MicrobatchSize) -> list[list[int]]:
    """Group rows into micro-batches, shortest rows first, so that rows of similar length share one.

    A row that is longer than ``size.tokens`` gets a micro-batch of its own.
    """
    parts: list[list[int]] = []
    tokens = 0  # tokens of the last part
    for row in sorted(rows, key=lambda row: (lengths[row], row)):
        length = lengths[row]
        if size.tokens is None:
            fits = bool(parts) and len(parts[-1]) < size.rows
        elif size.packed:
            fits = bool(parts) and tokens + length <= size.tokens
        else:
            fits = bool(parts) and (len(parts[-1]) + 1) * size.padded(length) <= size.tokens
        if not fits:
            parts.append([])
            tokens = 0
        parts[-1].append(row)
        tokens += length
    return parts


def select(record: Record, rows: Sequence[int], num_columns: int) -> Record:
    """Select rows of every tensor of a record. Tensors of two dimensions are cut or padded with zeros to ``num_columns`` columns."""
    index = torch.as_tensor(rows)
    picked: dict[str, Any] = {}
    for name, value in vars(record).items():
        if isinstance(value, Tensor):
            value = value[index]
            value = to_columns(value, num_columns) if value.dim() == 2 else value
        picked[name] = value
    return type(record)(**picked)


def map_tensors(record: Record, change: Callable[[Tensor], Tensor]) -> Record:
    """Apply ``change`` to every tensor of a record, and return the new record. Fields that are None stay None."""
    return type(record)(**{name: None if value is None else change(value) for name, value in vars(record).items()})


def split(
    token_ids: Tensor,
    sequence_lengths: Tensor,
    inputs: Any,
    rows: Sequence[int],
    size: MicrobatchSize,
    output_mask: Tensor | None = None,
) -> list[tuple[list[int], Microbatch]]:
    """Cut ``rows`` into micro-batches of similar lengths. Each is padded to the length of its longest row.

    Args:
        token_ids: [B, S] int64, right-padded.
        sequence_lengths: [B] int64.
        inputs: Record of [B, S - 1] and [B] tensors, or None.
        rows: Rows to take.
        size: Largest size of a micro-batch.
        output_mask: Tokens whose outputs are read, [B, S] bool; None means every token.

    Returns:
        Pairs of rows and micro-batch, which together hold every row once.
    """
    result = []
    for taken in cut(sequence_lengths.tolist(), rows, size):
        index = torch.as_tensor(taken)
        longest = size.padded(int(sequence_lengths[index].max()))
        ids = token_ids[index, :longest]
        if ids.shape[1] < longest:
            ids = pad(ids, (0, longest - ids.shape[1]))
        part = None if inputs is None else select(inputs, taken, longest - 1)
        read = None if output_mask is None else to_columns(output_mask[index], longest)
        result.append((taken, Microbatch(ids, sequence_lengths[index], part, read)))
    return result


def pair_tokens(batch: PreferenceBatch, size: MicrobatchSize) -> list[int]:
    """Return the number of tokens of every pair. Without packing both sequences count as the longer one, to which they are padded."""
    if size.packed:
        return (batch.chosen_lengths + batch.rejected_lengths).tolist()
    return (2 * torch.maximum(batch.chosen_lengths, batch.rejected_lengths)).tolist()


def split_pairs(batch: PreferenceBatch, pairs: Sequence[int], size: MicrobatchSize) -> list[Microbatch]:
    """Cut pairs into micro-batches of whole pairs. Rows 0..b/2 - 1 are the chosen sequences, the other rows the rejected ones in the same order.

    Args:
        batch: All pairs.
        pairs: Pairs to take.
        size: Largest size of a micro-batch, which has at least one pair nevertheless.
    """
    pair_size = replace(size, rows=max(1, size.rows // 2), length_multiple=2 * size.length_multiple)
    result = []
    for part in cut(pair_tokens(batch, size), pairs, pair_size):
        index = torch.as_tensor(part)
        longest = size.padded(int(torch.maximum(batch.chosen_lengths[index], batch.rejected_lengths[index]).max()))
        ids = torch.cat([to_columns(batch.chosen_ids[index], longest), to_columns(batch.rejected_ids[index], longest)])
        both = torch.cat([batch.chosen_lengths[index], batch.rejected_lengths[index]])
        result.append(Microbatch(ids, both, output_mask=sequence_ends(both, longest)))
    return result


def with_fillers(microbatches: Sequence[Microbatch], at_least: int, length: int) -> list[Microbatch]:
    """Add micro-batches until there are ``at_least`` so many. An added one has one row, which no loss counts.

    Expert layers are collective over ranks, so all of these ranks need the same number of micro-batches.

    Args:
        microbatches: Micro-batches of this rank.
        at_least: Number of micro-batches that the result has at least.
        length: Number of tokens of an added micro-batch.
    """
    inputs = microbatches[0].inputs
    if inputs is not None:
        inputs = map_tensors(select(inputs, [0], length - 1), torch.zeros_like)
    ids = torch.zeros(1, length, dtype=torch.int64)
    filler = Microbatch(ids, torch.ones(1, dtype=torch.int64), inputs)
    return [*microbatches, *[filler] * (at_least - len(microbatches))]


def same_shape(microbatches: Sequence[Microbatch], stages: int) -> list[Microbatch]:
    """Pad all micro-batches to the largest [b, s] among them, and add empty ones up to a multiple of ``stages``.

    Megatron-Core's interleaved schedule needs activations of one shape, and a number of micro-batches that the stages divide. The mask
    of every loss leaves out what is added. The loss of pairs has no mask, so their micro-batches may not be padded here.
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
        output_mask = None if m.output_mask is None else pad(m.output_mask, (0, columns, 0, rows))
        padded.append(Microbatch(pad(m.token_ids, (0, columns, 0, rows)), lengths, inputs, output_mask))
    first = padded[0]
    nothing = None
    if first.inputs is not None:
        nothing = map_tensors(first.inputs, torch.zeros_like)
    unread = None if first.output_mask is None else torch.zeros_like(first.output_mask)
    empty = Microbatch(torch.zeros_like(first.token_ids), torch.ones_like(first.sequence_lengths), nothing, unread)
    return padded + [empty] * (-len(padded) % stages)


def sequence_ends(sequence_lengths: Tensor, num_columns: int) -> Tensor:
    """Return a mask, [b, num_columns] bool, that is True at the last token of each sequence."""
    return torch.arange(num_columns) == last_token_index(sequence_lengths)[:, None]


def to_columns(value: Tensor, num_columns: int) -> Tensor:
    """Cut a [b, t] tensor to [b, num_columns], or pad it with zeros. Padding to ``length_multiple`` is added and removed here."""
    if value.shape[1] >= num_columns:
        return value[:, :num_columns]
    return pad(value, (0, num_columns - value.shape[1]))

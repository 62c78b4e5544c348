"""Cut rows into micro-batches, and put what they computed back in place."""

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
    """How large a micro-batch may be: so many sequences, or so many tokens."""

    rows: int  # sequences, where tokens is None
    tokens: int | None = None  # of the padded micro-batch, or of its sequences where they are packed
    packed: bool = False  # sequences lie one after the other, without padding
    length_multiple: int = 1  # of padded lengths (sequence parallelism cuts them into equal parts)
    packed_multiple: int = 1  # of the tokens of a packed micro-batch
    head_multiple: int = 1  # of the tokens that the head computes, as far as there are others to add
    attention_multiple: int = 1  # packed: of the lengths that sequences are padded to where attention needs it

    def padded(self, length: int) -> int:
        """The length that a micro-batch with a longest sequence of ``length`` tokens is padded to."""
        return _up(length, self.length_multiple)

    def packed_length(self, tokens: int) -> int:
        """The length of a packed micro-batch of ``tokens`` tokens."""
        return _up(tokens, self.packed_multiple)


def _up(number: int, multiple: int) -> int:
    return number + -number % multiple


def deal(lengths: Sequence[int], rows: Sequence[int], ranks: int, *, even: bool) -> list[list[int]]:
    """Rows of every data-parallel rank, so that their sums of tokens are near equal.

    The longest row left goes to the rank with the fewest tokens (Graham 1969, "Bounds on multiprocessing timing anomalies"): the
    largest sum is at most a third above the best possible one. Ties go to the lower row and the lower rank.

    Args:
        lengths: Tokens of every row, those not in ``rows`` too.
        rows: The rows to deal.
        ranks: Number of ranks.
        even: No rank gets more than ceil(rows / ranks) of them, as micro-batches of so many rows want it.

    Returns:
        For each rank its rows, ascending; at least one where there are as many rows as ranks.
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
    """The rows of every micro-batch, shortest first, so that rows of similar length share one.

    A row that is longer than ``size.tokens`` has a micro-batch to itself.
    """
    parts: list[list[int]] = []
    tokens = 0  # of the last part's sequences
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
    """The rows of every tensor of a record; tensors with two dimensions get ``num_columns`` columns, added ones 0."""
    index = torch.as_tensor(rows)
    picked: dict[str, Any] = {}
    for name, value in vars(record).items():
        if isinstance(value, Tensor):
            value = value[index]
            value = to_columns(value, num_columns) if value.dim() == 2 else value
        picked[name] = value
    return type(record)(**picked)


def map_tensors(record: Record, change: Callable[[Tensor], Tensor]) -> Record:
    """The record with every tensor changed; what is None stays None."""
    return type(record)(**{name: None if value is None else change(value) for name, value in vars(record).items()})


def split(
    token_ids: Tensor,
    sequence_lengths: Tensor,
    inputs: Any,
    rows: Sequence[int],
    size: MicrobatchSize,
    output_mask: Tensor | None = None,
) -> list[tuple[list[int], Microbatch]]:
    """Micro-batches of ``rows``, each with rows of similar length and padded to its own longest.

    Args:
        token_ids: [B, S] int64, right-padded.
        sequence_lengths: [B] int64.
        inputs: A record of [B, S - 1] and [B] tensors, or None.
        rows: The rows to take.
        size: Of a micro-batch.
        output_mask: Tokens whose outputs are read, [B, S] bool; None: every token.

    Returns:
        (rows, micro-batch) pairs; together they hold every row once.
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
    """Tokens that every pair counts for: both sequences, twice the longer one where padding makes them equal."""
    if size.packed:
        return (batch.chosen_lengths + batch.rejected_lengths).tolist()
    return (2 * torch.maximum(batch.chosen_lengths, batch.rejected_lengths)).tolist()


def split_pairs(batch: PreferenceBatch, pairs: Sequence[int], size: MicrobatchSize) -> list[Microbatch]:
    """Micro-batches of whole pairs: rows 0..b/2 - 1 are chosen, the others rejected in the same order.

    Args:
        batch: All pairs.
        pairs: The pairs to take.
        size: Of a micro-batch; at least one pair is taken.
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
    """``at_least`` so many: expert layers are collective over ranks that may have fewer micro-batches than others. What is added is
    one row that no loss counts.

    Args:
        length: Tokens of an added micro-batch.
    """
    inputs = microbatches[0].inputs
    if inputs is not None:
        inputs = map_tensors(select(inputs, [0], length - 1), torch.zeros_like)
    ids = torch.zeros(1, length, dtype=torch.int64)
    filler = Microbatch(ids, torch.ones(1, dtype=torch.int64), inputs)
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
    """[b] int64 -> [b, num_columns] bool, True at each sequence's last token."""
    return torch.arange(num_columns) == last_token_index(sequence_lengths)[:, None]


def to_columns(value: Tensor, num_columns: int) -> Tensor:
    """[b, t] -> [b, num_columns]: cut, or padded with zeros (the padding of length_multiple comes and goes here)."""
    if value.shape[1] >= num_columns:
        return value[:, :num_columns]
    return pad(value, (0, num_columns - value.shape[1]))

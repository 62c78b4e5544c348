"""Micro-batches hold every row once, padded no further than asked, and loss inputs follow the tokens."""

from __future__ import annotations

import torch
from hetero_ppo.engines.microbatches import (
    MicrobatchSize,
    cut,
    deal,
    pair_tokens,
    same_shape,
    select,
    split,
    split_pairs,
    to_columns,
    with_fillers,
)
from hetero_ppo.types import AnswerInputs, PolicyInputs, PreferenceBatch

TOKENS = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8], [9, 10, 0, 0, 0]])
LENGTHS = torch.tensor([3, 5, 2])
MASK = torch.arange(4)[None] < (LENGTHS - 1)[:, None]


def test_rows_come_once_sorted_by_length_and_padded_to_the_longest_of_each() -> None:
    parts = split(TOKENS, LENGTHS, AnswerInputs(MASK), [0, 1, 2], MicrobatchSize(2))
    assert [rows for rows, _ in parts] == [[2, 0], [1]]
    first, second = (microbatch for _, microbatch in parts)
    assert first.token_ids.tolist() == [[9, 10, 0], [1, 2, 3]]
    assert first.inputs.mask.tolist() == [[True, False], [True, True]]
    assert second.token_ids.tolist() == [[4, 5, 6, 7, 8]] and second.sequence_lengths.tolist() == [5]


def test_length_multiple_beyond_the_batch_pads_tokens_and_inputs() -> None:
    ((_, microbatch),) = split(TOKENS, LENGTHS, AnswerInputs(MASK), [1], MicrobatchSize(2, length_multiple=8))
    assert microbatch.token_ids.tolist() == [[4, 5, 6, 7, 8, 0, 0, 0]]
    assert microbatch.inputs.mask.tolist() == [[True] * 4 + [False] * 3]


def test_pairs_stay_together_chosen_first() -> None:
    batch = PreferenceBatch(TOKENS, LENGTHS, TOKENS[:, :4] + 100, torch.tensor([4, 2, 1]))
    parts = split_pairs(batch, [0, 1, 2], MicrobatchSize(4))
    assert [m.token_ids.shape[0] for m in parts] == [4, 2]
    assert parts[0].token_ids[:, 0].tolist() == [9, 1, 109, 101]
    assert parts[0].sequence_lengths.tolist() == [2, 3, 1, 4]
    assert parts[0].token_ids.shape[1] == 4 and parts[1].token_ids.shape[1] == 5


def test_a_pair_is_taken_even_when_the_micro_batch_is_smaller() -> None:
    batch = PreferenceBatch(TOKENS, LENGTHS, TOKENS, LENGTHS)
    assert len(split_pairs(batch, [0, 1, 2], MicrobatchSize(1))) == 3


def test_same_shape_adds_rows_that_no_loss_counts() -> None:
    parts = [m for _, m in split(TOKENS, LENGTHS, AnswerInputs(MASK), [0, 1, 2], MicrobatchSize(2))]
    assert len(same_shape(parts, 2)) == 2
    padded = same_shape(parts, 3)
    assert {m.token_ids.shape for m in padded} == {(2, 5)}
    assert padded[1].inputs.mask.tolist() == [[True] * 4, [False] * 4]
    assert padded[1].sequence_lengths.tolist() == [5, 1]
    assert len(padded) == 3 and not padded[2].inputs.mask.any()
    assert sum(int(m.inputs.mask.sum()) for m in padded) == int(MASK.sum())


def test_what_is_none_in_a_record_stays_none() -> None:
    values = torch.ones(3, 4)
    for weights in (None, values):
        inputs = PolicyInputs(values, values, values, MASK, weights)
        parts = [m for _, m in split(TOKENS, LENGTHS, inputs, [0, 1, 2], MicrobatchSize(2))]
        for microbatch in [*parts, *same_shape(parts, 3)]:
            expected = None if weights is None else microbatch.inputs.mask.shape
            found = microbatch.inputs.tis_weights
            assert (None if found is None else found.shape) == expected


def test_ranks_get_near_equal_tokens_and_every_row_once() -> None:
    """By hand: 9 | 8, then 7 to the 8, and 3, 2, 1 to the 9. And a long tail: no rank above the mean by half a longest row."""
    lengths = [3, 9, 1, 8, 2, 7]
    assert deal(lengths, range(6), 2, even=False) == [[0, 1, 2, 4], [3, 5]]
    assert deal(lengths, range(6), 2, even=True) == [[0, 1, 4], [2, 3, 5]]
    tail = [20 + 1000 // (row + 1) for row in range(64)]
    for even in (False, True):
        dealt = deal(tail, range(64), 4, even=even)
        assert sorted(row for rows in dealt for row in rows) == list(range(64))
        sums = [sum(tail[row] for row in rows) for rows in dealt]
        contiguous = [sum(tail[start : start + 16]) for start in range(0, 64, 16)]
        assert max(sums) - min(sums) < 0.1 * (max(contiguous) - min(contiguous))
        assert not even or [len(rows) for rows in dealt] == [16] * 4
    assert deal([5] * 7, range(7), 3, even=True) == [[0, 3, 6], [1, 4], [2, 5]]
    assert deal([5, 400, 5], [0, 2], 2, even=False) == [[0], [2]]  # of the rows asked for alone


def test_micro_batches_keep_to_the_budget_of_tokens() -> None:
    lengths = [30, 10, 20, 64, 10, 20]
    assert cut(lengths, range(6), MicrobatchSize(1, 64)) == [[1, 4, 2], [5, 0], [3]]  # 3 x 20 and 2 x 30 padded
    assert cut(lengths, range(6), MicrobatchSize(1, 64, packed=True)) == [[1, 4, 2, 5], [0], [3]]  # 60 tokens
    assert cut(lengths, range(6), MicrobatchSize(1, 64, length_multiple=16)) == [[1, 4], [2, 5], [0], [3]]
    assert cut(lengths, range(6), MicrobatchSize(4, None)) == [[1, 4, 2, 5], [0, 3]]
    assert cut(lengths, [3, 0], MicrobatchSize(4, 16)) == [[0], [3]]  # longer than the budget: alone


def test_a_budget_of_pairs_counts_both_sequences() -> None:
    batch = PreferenceBatch(TOKENS, LENGTHS, TOKENS[:, :4] + 100, torch.tensor([4, 2, 1]))
    assert pair_tokens(batch, MicrobatchSize(1)) == [8, 10, 4]
    assert pair_tokens(batch, MicrobatchSize(1, packed=True)) == [7, 7, 3]
    parts = split_pairs(batch, [0, 1, 2], MicrobatchSize(1, 16))
    assert [m.token_ids.shape for m in parts] == [(4, 4), (2, 5)]


def test_fillers_are_rows_that_no_loss_counts() -> None:
    parts = [m for _, m in split(TOKENS, LENGTHS, AnswerInputs(MASK), [0, 1, 2], MicrobatchSize(2))]
    filled = with_fillers(parts, 4, 2)
    assert filled[:2] == parts and [tuple(m.token_ids.shape) for m in filled[2:]] == [(1, 2), (1, 2)]
    assert filled[3].inputs.mask.tolist() == [[False]]


def test_select_and_to_columns() -> None:
    picked = select(AnswerInputs(MASK), [2, 1], 2)
    assert picked.mask.tolist() == [[True, False], [True, True]]
    assert to_columns(torch.ones(1, 2), 3).tolist() == [[1, 1, 0]]

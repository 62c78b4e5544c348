"""Ranges of a tensor's elements as boxes."""

from __future__ import annotations

import math

import pytest
import torch

from hetero_ppo.engines.optimizer_slices import boxes


def test_a_matrix_by_hand() -> None:
    """Elements 3 to 16 of four rows of five, the picture in the module."""
    assert list(boxes((4, 5), 3, 16)) == [((0, 3), (1, 2)), ((1, 0), (2, 5)), ((3, 0), (1, 1))]
    assert list(boxes((4, 5), 6, 9)) == [((1, 1), (1, 3))]  # inside of a row
    assert list(boxes((4, 5), 3, 7)) == [((0, 3), (1, 2)), ((1, 0), (1, 2))]  # over the end of one
    assert list(boxes((4, 5), 5, 15)) == [((1, 0), (2, 5))]
    assert list(boxes((7,), 2, 6)) == [((2,), (4,))]
    assert list(boxes((4, 5), 5, 5)) == []


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (1, 5, 1), (2, 2, 2, 3)])
def test_every_range_is_covered_in_order(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start in range(numbers.numel()):
        for end in range(start + 1, numbers.numel() + 1):
            found = list(boxes(shape, start, end))
            parts = [numbers[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].flatten() for box in found]
            assert torch.cat(parts).tolist() == list(range(start, end))
            assert len(found) <= 2 * len(shape) - 1

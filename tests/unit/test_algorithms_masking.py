"""Masks, means and whitening."""

import math

import pytest
import torch

from hetero_ppo.algorithms.masking import last_response_column, masked_mean, masked_sum, response_mask, whiten


def test_response_mask_covers_the_columns_that_predict_response_tokens() -> None:
    # Row 0: tokens p p p r r (pad); row 1: p r r r r r; row 2: no response.
    mask = response_mask(torch.tensor([3, 1, 4]), torch.tensor([5, 6, 4]), num_columns=5)
    assert mask.int().tolist() == [[0, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    assert last_response_column(mask).tolist() == [3, 4, -1]


def test_padding_does_not_change_the_mask() -> None:
    prompt, sequence = torch.tensor([3, 1]), torch.tensor([5, 6])
    short, long = response_mask(prompt, sequence, 5), response_mask(prompt, sequence, 9)
    assert torch.equal(short, long[:, :5])
    assert not long[:, 5:].any()


def test_masked_sum_and_mean_ignore_what_is_outside() -> None:
    values = torch.tensor([[1.0, math.nan], [3.0, math.inf]])
    mask = torch.tensor([[True, False], [True, False]])
    assert masked_sum(values, mask).item() == 4.0
    assert masked_mean(values, mask).item() == 2.0
    assert masked_mean(values, mask, denominator=8).item() == 0.5
    assert math.isnan(masked_mean(values, torch.zeros_like(mask)).item())


def test_whiten_by_hand() -> None:
    values = torch.tensor([[1.0, 3.0, 99.0]])
    mask = torch.tensor([[True, True, False]])
    assert whiten(values, mask, mean=2.0, var=1.0).tolist() == [[pytest.approx(-1.0), pytest.approx(1.0), 0.0]]


def test_whiten_of_equal_values_is_zero() -> None:
    mask = torch.tensor([[True, True]])
    assert whiten(torch.tensor([[2.0, 2.0]]), mask, mean=2.0, var=0.0).tolist() == [[0.0, 0.0]]

"""Generalised advantages against hand-worked values and the sum of equation 16."""

import pytest
import torch

from hetero_ppo.algorithms.gae import generalized_advantages
from hetero_ppo.algorithms.masking import response_mask


def test_three_tokens_by_hand() -> None:
    # gamma 0.5, lambda 0.5: decay 0.25. Columns 1..3 are the response; column 0 is prompt, column 4 padding.
    rewards = torch.tensor([[7.0, 1.0, 0.0, 2.0, 7.0]])
    values = torch.tensor([[9.0, 1.0, 2.0, 4.0, 9.0]])
    mask = torch.tensor([[False, True, True, True, False]])
    # deltas: 1 + 0.5*2 - 1 = 1;  0 + 0.5*4 - 2 = 0;  2 + 0 - 4 = -2
    # A3 = -2;  A2 = 0 + 0.25*-2 = -0.5;  A1 = 1 + 0.25*-0.5 = 0.875
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[0.0, 0.875, -0.5, -2.0, 0.0]]
    assert returns.tolist() == [[0.0, 1.875, 1.5, 2.0, 0.0]]


def test_lambda_one_is_the_return_minus_the_value_and_lambda_zero_the_td_error() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.5, 0.25, 3.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=1.0, lam=1.0)
    assert returns.tolist() == [[7.0, 6.0, 4.0]]
    assert advantages.tolist() == [[6.5, 5.75, 1.0]]
    advantages, _ = generalized_advantages(rewards, values, mask, gamma=1.0, lam=0.0)
    assert advantages.tolist() == [[0.75, 4.75, 1.0]]


def _ragged(generator: torch.Generator):
    prompt, sequence = torch.tensor([1, 5, 3, 4, 6]), torch.tensor([9, 7, 10, 5, 6])  # the last has no response
    rewards, values = torch.randn(2, 5, 9, generator=generator, dtype=torch.float64)
    return rewards, values, response_mask(prompt, sequence, 9)


def test_ragged_rows_follow_equation_16() -> None:
    rewards, values, mask = _ragged(torch.Generator().manual_seed(1))
    gamma, lam = 0.97, 0.9
    advantages, returns = generalized_advantages(rewards, values, mask, gamma, lam)
    for row in range(5):
        columns = mask[row].nonzero().flatten().tolist()
        for t in columns:
            expected = 0.0
            for k in range(t, columns[-1] + 1):
                next_value = values[row, k + 1].item() if k < columns[-1] else 0.0
                expected += (gamma * lam) ** (k - t) * (rewards[row, k] + gamma * next_value - values[row, k]).item()
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[row, t].item() == pytest.approx(expected + values[row, t].item(), abs=1e-12)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_padding_and_prompt_columns_change_no_bit() -> None:
    rewards, values, mask = _ragged(torch.Generator().manual_seed(2))
    advantages, returns = generalized_advantages(rewards, values, mask, 0.97, 0.9)

    def wider(x: torch.Tensor, fill: float):
        return torch.nn.functional.pad(x, (4, 7), value=fill)

    wide = generalized_advantages(wider(rewards, 3.0), wider(values, float("nan")), wider(mask, False), 0.97, 0.9)
    assert torch.equal(wide[0][:, 4:-7], advantages) and torch.equal(wide[1][:, 4:-7], returns)
    assert not wide[0][:, :4].any() and not wide[0][:, -7:].any()


def test_rows_do_not_see_each_other() -> None:
    rewards, values, mask = _ragged(torch.Generator().manual_seed(3))
    together = generalized_advantages(rewards, values, mask, 0.97, 0.9)
    for row in range(5):
        part = slice(row, row + 1)
        alone = generalized_advantages(rewards[part], values[part], mask[part], 0.97, 0.9)
        assert torch.equal(alone[0], together[0][part]) and torch.equal(alone[1], together[1][part])


def test_no_response_at_all() -> None:
    zeros = torch.zeros(2, 3)
    advantages, returns = generalized_advantages(zeros + 1, zeros + 1, zeros.bool(), 1.0, 0.95)
    assert not advantages.any() and not returns.any()


def test_values_get_no_graph() -> None:
    values = torch.ones(1, 3, requires_grad=True)
    advantages, returns = generalized_advantages(torch.ones(1, 3), values, torch.ones(1, 3).bool(), 1.0, 0.95)
    assert not advantages.requires_grad and not returns.requires_grad

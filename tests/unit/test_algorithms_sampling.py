"""Draws from logits: hand-worked cuts, exact frequencies, and log-probs of what was drawn from."""

from __future__ import annotations

import math

import pytest
import torch

from hetero_ppo.algorithms.sampling import sample_tokens

PROBS = torch.tensor([0.1, 0.4, 0.0, 0.3, 0.2])
LOGITS = PROBS.log().clamp(min=-200.0)
COUNT = 1000
GRID = (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT


def draw(
    uniforms: torch.Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int = -1
) -> tuple[list[float], list[float]]:
    """Return the frequencies of the five tokens over the random numbers, and the log-prob of each (0 for one that was never drawn)."""
    rows = LOGITS.repeat(len(uniforms), 1)
    tokens, log_probs = sample_tokens(rows, uniforms, temperature=temperature, top_p=top_p, top_k=top_k)
    given = [float(log_probs[tokens == token][0]) if (tokens == token).any() else 0.0 for token in range(5)]
    return [float((tokens == token).double().mean()) for token in range(5)], given


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0, 0.3, 0.2]),
        ({"temperature": 0.5}, [p * p / 0.3 for p in PROBS.tolist()]),  # 0.3 = sum of squares
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.75}, [0, 4 / 9, 0, 3 / 9, 2 / 9]),  # the token that reaches p is kept
        ({"top_k": 3, "top_p": 0.76}, [0, 4 / 7, 0, 3 / 7, 0]),  # p is of what top_k left: 7/9 reaches 0.76
        ({"top_p": 1e-6}, [0, 1, 0, 0, 0]),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
    ],
)
def test_frequencies_and_log_probs(options: dict[str, float], expected: list[float]) -> None:
    found, given = draw(GRID, **options)
    assert found == pytest.approx(expected, abs=1.01 / COUNT)
    logs = [math.log(p) if p else 0.0 for p in expected]
    if options.get("temperature") == 0.0:
        logs[1] = math.log(0.4)
    assert given == pytest.approx(logs, abs=1e-5)


def test_the_ends_of_the_unit_interval_give_likely_tokens() -> None:
    found, _ = draw(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert found == [0.5, 0, 0, 0, 0.5]
    logits = torch.tensor([[-1e4, 0.0, -1e4]])
    for uniform in (0.0, 1 - 2**-53):
        tokens, _ = sample_tokens(logits, torch.tensor([uniform]).double(), temperature=1.0, top_p=1.0, top_k=-1)
        assert tokens.tolist() == [1]


def test_rows_do_not_depend_on_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, uniforms = torch.randn(40, 64, generator=generator) * 3, torch.rand(40, generator=generator).double()
    options = {"temperature": 0.7, "top_p": 0.9, "top_k": 20}
    tokens, log_probs = sample_tokens(logits, uniforms, **options)
    for row in range(0, 40, 7):
        one = slice(row, row + 1)
        alone = sample_tokens(logits[one], uniforms[one], **options)
        assert alone[0].tolist() == tokens[one].tolist()
        assert float(alone[1]) == pytest.approx(float(log_probs[row]), abs=1e-6)

"""Checks that all generators share."""

from __future__ import annotations

import pytest

from hetero_ppo.config.schema import Dtype, RolloutConfig
from hetero_ppo.errors import RunError
from hetero_ppo.rollout.checks import probe_difference

EXPECTED = [-1.0, -2.0, -3.0]


def difference(found: list[float], dtype: Dtype = Dtype.fp32, **config: float) -> float:
    return probe_difference(
        found, EXPECTED, RolloutConfig(**config), dtype, "weight sync 'v1': generator 3", "bad weights"
    )


def test_the_largest_difference_counts_wherever_it_is() -> None:
    assert difference([-1.0, -2.0005, -3.0]) == pytest.approx(5e-4)
    assert difference([-1.1, -2.0, -3.0], Dtype.bf16) == pytest.approx(0.1)
    with pytest.raises(
        RunError, match=r"'v1': generator 3 gives token 2 of .* -2.10000, the trainer -2.00000.*\(0.001\): bad weights"
    ):
        difference([-1.0, -2.1, -3.0])
    with pytest.raises(RunError, match=r"verify_sync_tolerance \(0.01\)"):
        difference([-1.0, -2.1, -3.0], Dtype.bf16, verify_sync_tolerance=0.01)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_what_is_no_number_is_no_agreement(position: int) -> None:
    found = [*EXPECTED]
    found[position] = float("nan")
    with pytest.raises(RunError, match=f"gives token {position + 1} of the probe prompt a log-prob of nan"):
        difference(found)
    with pytest.raises(RunError, match="gives 2 log-probs of the probe prompt, the trainer 3"):
        difference(EXPECTED[:2])

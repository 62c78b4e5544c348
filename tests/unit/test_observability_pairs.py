"""Statistics of a reward model's pairs, by hand, and the page that shows them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hetero_ppo.observability.pairs import pair_statistics, write_pair_page


def test_statistics_by_hand() -> None:
    """Margins 2, -2, 0: one right, a tie is wrong. Confidences 0.881 (twice, half right) and 0.5 (wrong)."""
    found = pair_statistics([3.0, 1.0, 0.5], [1.0, 3.0, 0.5])
    confident = 1 / (1 + math.exp(-2))
    assert (found.num_right, found.accuracy) == (1, pytest.approx(1 / 3))
    assert found.loss == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(2)) + math.log(2)) / 3)
    assert found.bins == [(0.5, 0.0, 1), (pytest.approx(confident), 0.5, 2)]
    assert found.calibration_error == pytest.approx((0.5 + 2 * (confident - 0.5)) / 3)
    assert "accuracy 33.3333% (1 of 3 pairs)" in found.describe()


def test_no_pairs_is_an_error() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        pair_statistics([], [])


def test_page_holds_figures_and_plots(tmp_path: Path) -> None:
    page = write_pair_page(
        pair_statistics([1.0, 2.0], [0.0, 3.0]), tmp_path / "a" / "pairs.html", "model <x>"
    ).read_text()
    assert "50.00%" in page and page.count("<svg") == 2 and "model &lt;x&gt;" in page

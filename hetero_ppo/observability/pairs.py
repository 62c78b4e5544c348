"""Statistics of a reward model on pairs (accuracy, calibration, margins), and a page that shows them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from hetero_ppo.disk import writing
from hetero_ppo.observability.figures import COLOURS, GREY, STYLE, svg_text
from hetero_ppo.observability.report import PAGE
from hetero_ppo.observability.report import STYLE as PAGE_STYLE

#: Number of bins of confidence, from 0.5 to 1.
NUM_BINS = 10


@dataclass(frozen=True)
class PairStatistics:
    """Statistics of P pairs. With probability sigmoid(margin) the reward model prefers the chosen answer (Bradley and Terry 1952)."""

    margins: np.ndarray  # [P] float64, score of chosen minus score of rejected
    num_right: int  # number of margins above 0; a tie counts as wrong
    loss: float  # nats, mean of -log sigmoid(margin)
    calibration_error: float  # mean over pairs of |confidence - accuracy| of their bin (Guo et al. 2017, "ECE")
    bins: list[tuple[float, float, int]]  # confidence, accuracy and number of pairs of every bin that is not empty

    @property
    def accuracy(self) -> float:
        return self.num_right / len(self.margins)

    def describe(self) -> str:
        """Return the statistics as one line."""
        return (
            f"accuracy {self.accuracy:.4%} ({self.num_right} of {len(self.margins)} pairs), loss {self.loss:.6f}, mean margin "
            f"{self.margins.mean():.4f}, calibration error {self.calibration_error:.4f}"
        )


def pair_statistics(chosen: Sequence[float], rejected: Sequence[float]) -> PairStatistics:
    """Compute statistics of the scores of pairs.

    Raises:
        ValueError: There are no pairs.
    """
    if not chosen:
        raise ValueError("there are no pairs to compute statistics of")
    margins = np.asarray(chosen, dtype=np.float64) - np.asarray(rejected, dtype=np.float64)
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = margins > 0
    places = np.minimum(((confidence - 0.5) * 2 * NUM_BINS).astype(int), NUM_BINS - 1)
    bins, error = [], 0.0
    for place in range(NUM_BINS):
        members = places == place
        if members.any():
            entry = (float(confidence[members].mean()), float(right[members].mean()), int(members.sum()))
            error += abs(entry[0] - entry[1]) * entry[2] / len(margins)
            bins.append(entry)
    loss = float(np.logaddexp(0, -margins).mean())
    return PairStatistics(margins, int(right.sum()), loss, error, bins)


def write_pair_page(found: PairStatistics, out: Path, subtitle: str) -> Path:
    """Write an HTML page with the figures and two plots, everything inline. Return its path."""
    tiles = (
        ("accuracy", f"{found.accuracy:.2%}", f"{found.num_right} of {len(found.margins)} pairs"),
        ("loss", f"{found.loss:.4f}", f"nats; {math.log(2):.4f} is a guess"),
        ("mean margin", f"{found.margins.mean():.3f}", "chosen minus rejected"),
        ("calibration error", f"{found.calibration_error:.3f}", "mean |confidence - accuracy|"),
    )
    cards = "".join(
        f'<div class="card tile"><div class="name">{name}</div><div class="value">{value}</div>'
        f'<div class="from">{note}</div></div>'
        for name, value, note in tiles
    )
    with rc_context(STYLE):
        plots = [("Calibration", _calibration(found)), ("Margins", _margins(found))]
    figures = "".join(f'<div class="card"><h3>{title}</h3>{svg}</div>' for title, svg in plots)
    body = f'<section class="tiles">{cards}</section><h2>Plots</h2><div class="figures">{figures}</div>'
    page = PAGE.substitute(title="Reward model on pairs", subtitle=escape(subtitle), style=PAGE_STYLE, body=body)
    with writing(out, "plots", len(page), "choose another --out"):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    return out


def _calibration(found: PairStatistics) -> str:
    figure = Figure(figsize=(5.0, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0.5, 1], [0.5, 1], color=GREY, linestyle="--", label="calibrated")
    confidence, accuracy, counts = (np.asarray(column) for column in zip(*found.bins))
    axes.plot(confidence, accuracy, color=COLOURS[0], label="pairs by confidence")
    axes.scatter(confidence, accuracy, s=20 + 180 * counts / counts.max(), color=COLOURS[0], alpha=0.6)
    axes.set_xlabel("confidence, sigmoid(|margin|)")
    axes.set_ylabel("share that is right")
    axes.legend(loc="upper left")
    return svg_text(figure, "calibration")


def _margins(found: PairStatistics) -> str:
    figure = Figure(figsize=(5.0, 3.4), layout="constrained")
    axes = figure.add_subplot()
    edges = np.histogram_bin_edges(found.margins, bins=min(40, max(10, len(found.margins) // 10))).tolist()
    axes.hist(found.margins[found.margins > 0], edges, color=COLOURS[0], label="right")
    axes.hist(found.margins[found.margins <= 0], edges, color=COLOURS[1], label="wrong")
    axes.set_xlabel("score of chosen minus score of rejected")
    axes.set_ylabel("pairs")
    axes.legend()
    return svg_text(figure, "margins")

"""Draw the curves of a run as SVG text for inline use in an HTML page."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.typing import RcKeyType

from hetero_ppo.observability.records import RunRecord, Series
from hetero_ppo.observability.timers import TOTAL, top_level
from hetero_ppo.step.roles import ROLE_SECTIONS

#: Colours that colour-blind readers can distinguish; the line styles differ as well.
COLOURS = ("#2563eb", "#e0662f", "#0d9172", "#8b4fc1", "#b98900", "#c2375f", "#4b8fb3", "#6b7f2a")
GREY = "#b6bcc6"
INK = "#3b4351"

#: A curve or bar chart with more steps is averaged in bins, so that a long run's report stays small.
MAX_POINTS = 400
MAX_BARS = 80

STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",  # text stays text, which is small, sharp and searchable
    "font.size": 9,
    "axes.edgecolor": "#ccd1d9",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ebf0",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


@dataclass(frozen=True)
class Panel:
    """Curves on one pair of axes."""

    ylabel: str
    metrics: tuple[tuple[str, str], ...]  # metric name, label in the legend
    percent: bool = False  # values 0 to 1, shown as 0 to 100 %
    kind: str | None = None  # kind of run; None: any. "eval/accuracy" counts answers in PPO and pairs in a reward model


@dataclass(frozen=True)
class Group:
    """One figure: panels above each other."""

    title: str
    panels: tuple[Panel, ...]


#: Names of the sections of trained roles.
TRAINED = [role for role, section in ROLE_SECTIONS.items() if section.is_trained]

GROUPS: tuple[Group, ...] = (
    Group(
        "Reward",
        (
            Panel(
                "score per response",
                (
                    ("reward/mean", "rollouts"),
                    ("reward/with_kl_mean", "rollouts, with the KL penalty"),
                    ("eval/reward", "held-out prompts"),
                ),
            ),
        ),
    ),
    Group(
        "KL to the reference",
        (Panel("nats per response", (("kl/reference", "rollouts"), ("eval/kl", "held-out prompts"))),),
    ),
    Group(
        "Accuracy",
        (
            Panel(
                "% correct",
                (("eval/accuracy", "held-out, sampled"), ("eval/greedy_accuracy", "held-out, greedy")),
                percent=True,
                kind="ppo",
            ),
            Panel(
                "% of pairs",
                (("rm/accuracy", "training batch"), ("eval/accuracy", "held-out pairs")),
                percent=True,
                kind="rm",
            ),
        ),
    ),
    Group(
        "Response length",
        (
            Panel(
                "tokens",
                (
                    ("response_length/mean", "mean"),
                    ("response_length/max", "longest"),
                    ("eval/response_length", "held-out, mean"),
                ),
            ),
            Panel("% cut off", (("response_length/clip_ratio", "without an end of sequence"),), percent=True),
        ),
    ),
    Group(
        "Losses",
        (
            Panel("nats per token", (("sft/loss", "training batch"), ("eval/loss", "held-out answers")), kind="sft"),
            Panel("nats per pair", (("rm/loss", "training batch"), ("eval/loss", "held-out pairs")), kind="rm"),
            Panel("policy", (("actor/pg_loss", "actor/pg_loss"),)),
            Panel("value", (("critic/vf_loss", "critic/vf_loss"),)),
        ),
    ),
    Group(
        "Gradient norms, before clipping",
        (
            Panel(
                "L2 norm",
                (("train/grad_norm", "model"), *((f"{role}/grad_norm", role) for role in TRAINED)),
            ),
        ),
    ),
    Group(
        "Policy updates",
        (
            Panel("nats per token", (("actor/ppo_kl", "KL of a step's updates (actor/ppo_kl)"),)),
            Panel("% of tokens", (("actor/pg_clipfrac", "ratio clipped"),), percent=True),
            Panel("nats per token", (("actor/entropy", "entropy"),)),
        ),
    ),
    Group("Value function", (Panel("explained variance", (("critic/vf_explained_var", "of the returns"),)),)),
    Group(
        "Generator against trainer",
        (
            Panel(
                "|difference| in log-prob",
                (
                    ("rollout/log_prob_diff_mean", "rollouts, mean"),
                    ("rollout/log_prob_diff_max", "largest"),
                    ("rollout/probe_log_prob_diff", "after weight sync"),
                ),
            ),
            Panel(
                "% of response tokens", (("rollout/ratio_outside_share", "ratio outside 0.99 .. 1.01"),), percent=True
            ),
            Panel("nats per token", (("rollout/mismatch_kl", "KL of the generator to the trainer"),)),
        ),
    ),
    Group(
        "Score margin",
        (
            Panel(
                "chosen - rejected",
                (("rm/score_margin", "training batch"), ("eval/score_margin", "held-out pairs")),
                kind="rm",
            ),
        ),
    ),
    Group(
        "Learning rate",
        (Panel("per optimizer step", (("train/lr", "model"), *((f"{role}/lr", role) for role in TRAINED))),),
    ),
)


def group_figures(run: RunRecord) -> list[tuple[str, str]]:
    """Return (title, SVG) of every group that the run has metrics of, then of the seconds by phase and of the memory ledger."""
    series = {**run.series, **_evaluation_series(run)}
    figures: list[tuple[str, str]] = []
    with matplotlib.rc_context(STYLE):
        for group in GROUPS:
            panels = [
                panel
                for panel in group.panels
                if panel.kind in (None, run.kind) and any(_drawable(series, name) for name, _ in panel.metrics)
            ]
            if panels:
                figures.append((group.title, _draw_group(f"{run.dir}/{group.title}", panels, series)))
        if top_level({name: 0.0 for name in run.seconds if name != TOTAL}):
            figures.append(("Seconds per step, by phase", _draw_seconds(f"{run.dir}/seconds", run)))
        if run.ledger:
            figures.append(("On the device, by phase (roles, rank 0)", _draw_ledger(f"{run.dir}/ledger", run)))
    return figures


def phase_means(run: RunRecord) -> list[tuple[str, float]]:
    """Return (phase, mean seconds per step) of the top-level phases and "other", over all steps, the longest first."""
    steps = _phase_table(run)
    names = list(dict.fromkeys(name for row in steps.values() for name in row))
    means = [(name, sum(row.get(name, 0.0) for row in steps.values()) / len(steps)) for name in names]
    return sorted(means, key=lambda item: (item[0] == "other", -item[1]))


def _evaluation_series(run: RunRecord) -> dict[str, Series]:
    """Return held-out curves: before the first step, the evaluations during the run, and after the last step."""
    if run.before is None or run.after is None:
        return {}
    pairs = {
        "eval/accuracy": (run.before.accuracy, run.after.accuracy),
        "eval/greedy_accuracy": (run.before.greedy_accuracy, run.after.greedy_accuracy),
        "eval/reward": (run.before.reward, run.after.reward),
        "eval/kl": (run.before.kl, run.after.kl),
        "eval/response_length": (run.before.response_length, run.after.response_length),
    }
    curves: dict[str, Series] = {}
    for name, (before, after) in pairs.items():
        if before is not None and after is not None:
            during = run.series.get(name, Series([], []))
            points = {0: before, **dict(zip(during.steps, during.values, strict=True)), run.num_steps: after}
            curves[name] = Series(list(points), list(points.values()))
    return curves


def _drawable(series: dict[str, Series], name: str) -> bool:
    return name in series and any(math.isfinite(value) for value in series[name].values)


def _draw_group(identity: str, panels: list[Panel], series: dict[str, Series]) -> str:
    figure = Figure(figsize=(5.6, 2.7 if len(panels) == 1 else 1.75 * len(panels) + 0.3), layout="constrained")
    for axes, panel in zip(np.atleast_1d(figure.subplots(len(panels), 1, sharex=True)), panels, strict=True):
        drawn = [(name, label) for name, label in panel.metrics if _drawable(series, name)]
        for index, (name, label) in enumerate(drawn):
            _draw_curve(axes, series[name], label, COLOURS[index], 100.0 if panel.percent else 1.0)
        axes.set_ylabel(panel.ylabel)
        axes.margins(x=0.02, y=0.1)
        # "1e-05" at each tick instead of a factor above the axis, where the legend lies.
        axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10]))
        if panel.percent:
            _keep_percent_limits(axes)
        if len(drawn) > 1 or drawn[0][1] != drawn[0][0]:
            axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, borderaxespad=0.1, handlelength=1.4)
    axes.set_xlabel("step")
    return svg_text(figure, identity)


def _keep_percent_limits(axes: Axes) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -2.0), min(high, 102.0) if high > 1.0 else 1.0)


def _draw_curve(axes: Axes, series: Series, label: str, colour: str, scale: float) -> None:
    steps, values = _binned(series, MAX_POINTS)
    values = values * scale
    if len(steps) <= 12:
        # A curve with few points shows evaluations; the line between them is only a guide.
        axes.plot(
            steps, values, color=colour, marker="o", markersize=4.5, linewidth=1.1, linestyle=(0, (4, 3)), label=label
        )
        return
    if len(steps) < 30:
        axes.plot(steps, values, color=colour, linewidth=1.6, label=label)
        return
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    axes.plot(steps, _smoothed(values), color=colour, linewidth=1.8, label=label)


def _binned(series: Series, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Return means of equal bins of steps if there are more than ``limit``; a bin without a finite value gives NaN."""
    steps, values = np.asarray(series.steps, dtype=float), np.asarray(series.values, dtype=float)
    if len(steps) <= limit:
        return steps, values
    bins = np.array_split(np.arange(len(steps)), limit)
    return np.array([steps[rows].mean() for rows in bins]), np.array([_finite_mean(values[rows]) for rows in bins])


def _finite_mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Apply local linear regression (Cleveland 1979, without its weights) over a tenth of the curve, which smooths it. Gaps stay gaps.

    A moving mean would lag behind the data at both ends, where a reader looks first.
    """
    half = max(2, len(values) // 20)
    places = np.arange(len(values), dtype=float)
    smooth = np.full(len(values), math.nan)
    for i in np.flatnonzero(np.isfinite(values)):
        window = slice(max(0, i - half), i + half + 1)
        known = np.isfinite(values[window])
        # The fit is relative to the point itself, so that a constant curve stays exactly constant.
        x, y = places[window][known] - i, values[window][known] - values[i]
        smooth[i] = values[i] + (np.polyfit(x, y, 1)[1] if len(x) > 2 else 0.0)
    return smooth


def _phase_table(run: RunRecord) -> dict[int, dict[str, float]]:
    """Return step -> seconds of its top-level phases, for the steps that were timed."""
    rows: dict[int, dict[str, float]] = {}
    for name, series in run.seconds.items():
        for step, value in zip(series.steps, series.values, strict=True):
            rows.setdefault(step, {})[name] = value
    return {step: top_level(rows[step]) for step in sorted(rows)}


def _draw_seconds(identity: str, run: RunRecord) -> str:
    table = _phase_table(run)
    names = [name for name, _ in phase_means(run)]
    steps = list(table)
    figure = Figure(figsize=(5.6, 3.1), layout="constrained")
    axes = figure.subplots()
    bins = np.array_split(np.arange(len(steps)), min(len(steps), MAX_BARS))
    edges = [steps[rows[0]] - 0.5 for rows in bins] + [steps[-1] + 0.5]
    bottom = np.zeros(len(bins))
    colours = iter(COLOURS)
    for name in names:
        seconds = np.array([table[step].get(name, 0.0) for step in steps])
        heights = np.array([seconds[rows].mean() for rows in bins])
        colour = GREY if name == "other" else next(colours, GREY)
        axes.stairs(bottom + heights, edges, baseline=bottom, fill=True, color=colour, label=name, linewidth=0)
        bottom = bottom + heights
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("seconds")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10]))
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, borderaxespad=0.1, handlelength=1.0)
    return svg_text(figure, identity)


def _draw_ledger(identity: str, run: RunRecord) -> str:
    """Draw a bar for every phase, coloured by kind. The dashed line shows the bytes if all roles stayed on the device."""
    phases = list(run.ledger)
    kinds = list(dict.fromkeys(kind for roles in run.ledger.values() for held in roles.values() for kind in held))
    whole: dict[tuple[str, str], int] = {}
    for roles in run.ledger.values():
        for role, held in roles.items():
            for kind, size in held.items():
                whole[role, kind] = max(size, whole.get((role, kind), 0))
    unit, name = (2**30, "GiB") if sum(whole.values()) >= 2**30 else (2**20, "MiB")
    figure = Figure(figsize=(5.6, 0.34 * len(phases) + 1.0), layout="constrained")
    axes = figure.subplots()
    labels = [
        f"{phase}\n{' + '.join(role for role, held in roles.items() if held)}" for phase, roles in run.ledger.items()
    ]
    left = np.zeros(len(phases))
    for kind, colour in zip(kinds, COLOURS):
        widths = np.array([sum(held.get(kind, 0) for held in run.ledger[phase].values()) / unit for phase in phases])
        axes.barh(labels, widths, left=left, color=colour, label=kind, height=0.72)
        left = left + widths
    axes.axvline(sum(whole.values()) / unit, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label="all roles staying")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel(name)
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=5, borderaxespad=0.1, handlelength=1.0)
    return svg_text(figure, identity)


def svg_text(figure: Figure, identity: str) -> str:
    """Return the SVG element of a figure.

    Args:
        figure: Figure to draw.
        identity: Salt of the element's ids; figures on the same page must have different ones.
    """
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": identity}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]

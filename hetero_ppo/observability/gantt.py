"""Draw a traced step: a row for every lane with its spans, and the share of the step in which it was idle."""

from __future__ import annotations

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hetero_ppo.observability.figures import COLOURS, GREY, INK, STYLE, svg_text
from hetero_ppo.observability.trace import GENERATOR, TRAINER, WAIT, WAIT_FOR_GENERATOR, Span, StepTrace
from hetero_ppo.step.roles import GENERATOR_COLOUR, ROLE_SECTIONS, WAIT_COLOUR

LANE_COLOURS = {
    TRAINER: GREY,
    **{name: COLOURS[section.colour] for name, section in ROLE_SECTIONS.items()},
    GENERATOR: COLOURS[GENERATOR_COLOUR],
}
WAIT_COLOURS = {WAIT: COLOURS[WAIT_COLOUR], WAIT_FOR_GENERATOR: "#f4d9c6"}

WIDTH = 10.5  # inches
BAR = 0.76  # height of a bar, as a share of the row's
#: Share of the step below which a span's edge has the span's own colour.
SHORT = 0.003
#: Width of a label's letter and of the plot, in inches: a label that does not fit into its span is left out.
LETTER, PLOT_WIDTH = 0.062, 0.82 * WIDTH


def gantt_svg(trace: StepTrace, identity: str) -> str:
    """Return the SVG element of the picture.

    Args:
        trace: Traced step.
        identity: Salt of the element's ids; figures on the same page must have different ones.
    """
    with matplotlib.rc_context(STYLE):
        return svg_text(draw_gantt(trace), identity)


def draw_gantt(trace: StepTrace) -> Figure:
    """Draw a row for each lane, the trainer's on top. A span inside another one is darker; copies have the colour of their role."""
    lanes = trace.lanes()
    figure = Figure(figsize=(WIDTH, 0.36 * len(lanes) + 0.9), layout="constrained")
    axes = figure.subplots()
    unit, scale = ("s", 1.0) if trace.seconds >= 1 else ("ms", 1e3)
    for row, lane in enumerate(lanes):
        _draw_lane(axes, row, [span for span in trace.spans if span.lane == lane], trace.seconds, scale)
        axes.text(
            1.008,
            row,
            idle_text(trace.idle_share(lane)),
            transform=axes.get_yaxis_transform(),
            va="center",
            color=INK,
        )
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.set_xlim(0, trace.seconds * scale)
    axes.grid(axis="y", visible=False)
    kinds = [
        Patch(color=WAIT_COLOURS[WAIT_FOR_GENERATOR], label="the trainer waits for the generator"),
        Patch(color=WAIT_COLOURS[WAIT], label="the computation waits for copies"),
        Patch(color=INK, alpha=0.6, label="optimizer step, inside a turn"),
    ]
    axes.legend(
        handles=kinds, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, borderaxespad=0.1, handlelength=1.0
    )
    axes.set_xlabel(f"{unit} since the step began")
    return figure


def idle_text(share: float) -> str:
    """Return the share in whole percent. 0 and 100 stand only for exactly none and all."""
    percent = round(100 * share)
    if percent == 100 and share < 1:
        return "idle >99 %"
    if percent == 0 and share > 0:
        return "idle <1 %"
    return f"idle {percent} %"


def _draw_lane(axes: Axes, row: int, spans: list[Span], seconds: float, scale: float) -> None:
    reached = float("-inf")
    for span in spans:  # sorted by start; the outer one of nested spans comes first
        inside = span.end <= reached
        reached = max(reached, span.end)
        bar = [(span.start * scale, (span.end - span.start) * scale)], (row - BAR / 2, BAR)
        share = (span.end - span.start) / seconds
        if inside and span.name not in WAIT_COLOURS:
            if span.lane != TRAINER:  # the trainer's nested phases are the roles' turns
                axes.broken_barh(*bar, facecolor=INK, alpha=0.35, linewidth=0)
            continue
        role = str(span.args.get("role", span.lane)).partition(".")[0]  # the members of an ensemble share a colour
        colour = WAIT_COLOURS.get(span.name) or LANE_COLOURS.get(role, GREY)
        # The edge separates neighbouring spans, or keeps a span visible that is shorter than a dot.
        axes.broken_barh(*bar, facecolor=colour, edgecolor="white" if share > SHORT else colour, linewidth=0.6)
        if share * PLOT_WIDTH > LETTER * (len(span.name) + 1):
            middle = (span.start + span.end) / 2 * scale
            ink = INK if span.lane == TRAINER else "white"
            axes.text(middle, row, span.name, ha="center", va="center", color=ink, fontsize=7.5, clip_on=True)

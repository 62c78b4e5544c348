"""Draw the turns of a PPO step on one device: python docs/draw_turns.py (writes docs/turns.svg)."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hetero_ppo.observability.figures import COLOURS, GREY, INK, STYLE
from hetero_ppo.step.kinds import TRAINING
from hetero_ppo.step.phases import GeneratorMemory, Phase, ppo_phases
from hetero_ppo.step.roles import GENERATOR_COLOUR, section_of

GENERATOR = "generator"
#: Height of a bar, as a share of its row.
FORWARD_HEIGHT, TRAINING_HEIGHT = 0.42, 0.84


def rows_of(phases: list[Phase]) -> list[str]:
    """Return the generator, and the roles in the order of their first phase."""
    return [GENERATOR, *dict.fromkeys(phase.role for phase in phases if phase.role is not None)]


def draw_turns(phases: list[Phase]) -> Figure:
    """Draw a column for each phase and a row for the generator and each role.

    A bar says what is on the device. It is high while gradients and the optimizer are there too, and dark in the row that computes.
    """
    rows = rows_of(phases)
    figure = Figure(figsize=(1.15 * len(phases) + 1.4, 0.48 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots()
    for column, phase in enumerate(phases):
        for role, kinds in phase.needs.items():
            colour = COLOURS[section_of(role).colour]
            height = TRAINING_HEIGHT if kinds == TRAINING else FORWARD_HEIGHT
            _bar(axes, column, rows.index(role), height, colour, computes=role == phase.role)
        if phase.generator is not GeneratorMemory.nothing:
            height = TRAINING_HEIGHT if phase.generator is GeneratorMemory.everything else FORWARD_HEIGHT
            _bar(axes, column, 0, height, COLOURS[GENERATOR_COLOUR], computes=phase.role is None)
    axes.set_xticks(range(len(phases)), [phase.name.replace("_", "\n", 1) for phase in phases])
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlim(-0.5, len(phases) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(
        "dark: it computes; pale: it waits on the device; high: with gradients and optimizer (generator: with its key-value cache)",
        color=INK,
    )
    return figure


def _bar(axes: Axes, column: int, row: int, height: float, colour: str, *, computes: bool) -> None:
    edge = GREY if not computes else colour
    axes.add_patch(
        Rectangle(
            (column - 0.46, row - height / 2),
            0.92,
            height,
            facecolor=colour,
            alpha=1.0 if computes else 0.3,
            edgecolor=edge,
        )
    )


def main() -> None:
    """Write the picture of a step with overlapped generation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("turns.svg"))
    out = parser.parse_args().out
    phases = ppo_phases(reward_models=["reward_model"], actor_scores_old=True)
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "turns"}):
        draw_turns(phases).savefig(out, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()

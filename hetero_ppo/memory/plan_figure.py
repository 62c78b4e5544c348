"""The plan's device memory as a picture: a stacked bar for every phase, and the device's size."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from hetero_ppo.memory.plan import GIB, MemoryPlan, PhasePlan
from hetero_ppo.memory.plan_text import resident_text
from hetero_ppo.observability.figures import COLOURS, GREY, INK, STYLE
from hetero_ppo.step.kinds import Kind

SUFFIXES = (".svg", ".png", ".pdf")


def _parts(phase: PhasePlan) -> dict[str, int]:
    """Return the bytes by their use, in the order of the bars."""
    kinds = {kind.value: phase.of_kind(kind) for kind in Kind}
    estimated = {"activations": phase.activations, "ahead of the next turn": phase.ahead}
    return {**kinds, **estimated, "generator": phase.generator, "reserve": phase.reserve}


def draw_plan(plan: MemoryPlan, path: str) -> None:
    """Write the picture in the format of its suffix.

    Args:
        plan: Plan of a run.
        path: File to write.

    Raises:
        ValueError: The suffix is not in ``SUFFIXES``, or the file cannot be written.
    """
    if not path.endswith(SUFFIXES):
        raise ValueError(f"--figure {path}: a picture ends in {', '.join(SUFFIXES)}")
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "plan"}):
        figure = Figure(figsize=(8.0, 0.42 * len(plan.phases) + 1.2), layout="constrained")
        axes = figure.subplots()
        names = [f"{phase.phase}\n{resident_text(plan, phase)}" for phase in plan.phases]
        left = [0.0] * len(names)
        for colour, label in zip((*COLOURS[: len(Kind) + 3], GREY), _parts(plan.phases[0]), strict=True):
            widths = [_parts(phase)[label] / GIB for phase in plan.phases]
            if any(widths):
                axes.barh(names, widths, left=left, color=colour, label=label, height=0.72)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        if plan.device_bytes is not None:
            axes.axvline(plan.device_bytes / GIB, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
            axes.annotate(
                "one device ", (plan.device_bytes / GIB, -0.45), ha="right", va="bottom", color=INK, fontsize=8
            )
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", labelsize=7.5)
        axes.set_xlabel("GiB on the fullest rank")
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, borderaxespad=0.1, handlelength=1.0)
        try:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.endswith(".svg") else None)
        except OSError as error:
            raise ValueError(f"--figure {path}: {Path(path).name} cannot be written ({error.strerror})") from error

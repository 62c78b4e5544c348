"""Remove records of later steps from a run folder. A run that continues in its folder does the steps after its checkpoint again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from hetero_ppo.observability.jsonl import cut
from hetero_ppo.observability.sinks.jsonl import METRICS_FILE
from hetero_ppo.observability.records import EVAL_AFTER_FILE
from hetero_ppo.observability.trace import TRACE_FOLDER

STEP_FILE = re.compile(r"step_(\d+)\.jsonl?")


def forget_later_steps(run_dir: Path, step: int, *, replayed: Path | None) -> list[str]:
    """Remove metrics, rollouts and traces of later steps, and lines that a kill has cut. Return messages about what was removed.

    Args:
        run_dir: Folder of the run, which is about to do its first step.
        step: Number of steps done.
        replayed: Folder of rollouts that the run replays; it is kept.
    """
    metrics, messages = run_dir / METRICS_FILE, []
    if metrics.is_file():
        what = f"records of steps after {step}, which are done again,"
        text = cut(metrics, lambda record: int(record.get("step", 0)) <= step).describe(METRICS_FILE, what)
        messages += [] if text is None else [text]
    if (run_dir / EVAL_AFTER_FILE).is_file():
        (run_dir / EVAL_AFTER_FILE).unlink()
        messages.append(f"{EVAL_AFTER_FILE}: removed, it is made again after the last step")
    for name in ("rollouts", TRACE_FOLDER):
        folder = run_dir / name
        if replayed is not None and folder.resolve() == replayed.resolve():
            continue
        later = list(_later(folder, step))
        for path in later:
            path.unlink()
        messages += [f"{name}: {len(later)} files of steps after {step} removed"] if later else []
    return messages


def _later(folder: Path, step: int) -> Iterator[Path]:
    for path in sorted(folder.glob("step_*.json*")):
        match = STEP_FILE.fullmatch(path.name)
        if match is not None and int(match[1]) > step:
            yield path

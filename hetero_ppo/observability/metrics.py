"""Where a step's metrics go: console, JSONL, TensorBoard, Weights & Biases.

Names are verl's: ``actor/pg_loss``, ``actor/ppo_kl``, ``actor/entropy``, ``actor/grad_norm``, ``critic/vf_loss``,
``critic/vf_explained_var``, ``reward/mean``, ``response_length/mean``, ``kl/reference``, ``timing_s/<phase>``, ...
"""

from __future__ import annotations

import json
import math
import secrets
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from hetero_ppo.config.schema import RunConfig
from hetero_ppo.disk import writing
from hetero_ppo.observability.timers import TOTAL
from hetero_ppo.types import StepMetrics

#: Id of the folder's run at Weights & Biases.
WANDB_FILE = "wandb_run.txt"
#: File of the run folder with one JSON object per logged record.
METRICS_FILE = "metrics.jsonl"

#: Metrics of the console line, in order: name, label, format. A record prints those that it has, so one table serves
#: SFT, reward model, PPO, and their evaluations. Everything else is in the files.
HEADLINES: tuple[tuple[str, str, str], ...] = (
    ("train/loss", "loss", "8.4f"),
    ("rm/accuracy", "acc", "6.3f"),
    ("rm/score_margin", "margin", "7.3f"),
    ("train/grad_norm", "grad", "7.3f"),
    ("train/lr", "lr", "8.2e"),
    ("reward/mean", "reward", "7.3f"),
    ("kl/reference", "kl", "7.3f"),
    ("response_length/mean", "len", "6.1f"),
    ("actor/pg_loss", "pg", "8.4f"),
    ("actor/ppo_kl", "ppo_kl", "8.5f"),
    ("actor/entropy", "ent", "6.3f"),
    ("actor/grad_norm", "a.grad", "7.3f"),
    ("critic/vf_loss", "vf", "8.4f"),
    ("critic/vf_explained_var", "ev", "6.3f"),
    ("eval/loss", "eval loss", "7.4f"),
    ("eval/accuracy", "eval acc", "6.3f"),
    ("eval/score_margin", "eval margin", "7.3f"),
    ("eval/greedy_accuracy", "eval greedy", "6.3f"),
    ("eval/reward", "eval reward", "7.3f"),
    ("eval/kl", "eval kl", "7.3f"),
    ("eval/response_length", "eval len", "6.1f"),
)


def console_line(record: StepMetrics, total_steps: int | None = None) -> str:
    """One aligned line of the headline metrics that the record has (the first six metrics when it has none of them)."""
    shown = [f"{label} {record.values[name]:{spec}}" for name, label, spec in HEADLINES if name in record.values] or [
        f"{name} {value:.4g}" for name, value in list(record.values.items())[:6]
    ]
    step = f"{record.step}" if total_steps is None else f"{record.step:>{len(str(total_steps))}}/{total_steps}"
    parts = [f"step {step:>5}", *shown]
    if TOTAL in record.seconds:
        parts.append(f"{record.seconds[TOTAL]:6.2f} s")
    bad = non_finite(record.values)
    if bad:
        parts.append("NOT FINITE: " + ", ".join(f"{name} = {text}" for name, text in bad.items()))
    if record.note:
        parts.append(record.note)
    return " | ".join(parts)


def json_record(record: StepMetrics, now: float) -> dict[str, Any]:
    """The object of one JSONL line: step, time (Unix seconds), metrics, seconds by phase.

    JSON has no NaN or infinity: such a value is null, and ``non_finite`` says which one it was.
    """
    line: dict[str, Any] = {
        "step": record.step,
        "time": round(now, 3),
        "metrics": {name: float(value) if math.isfinite(value) else None for name, value in record.values.items()},
        "seconds": {name: round(value, 6) for name, value in record.seconds.items()},
    }
    bad = non_finite(record.values)
    if bad:
        line["non_finite"] = bad
    if record.note is not None:
        line["note"] = record.note
    return line


def non_finite(values: dict[str, float]) -> dict[str, str]:
    """Name -> "nan", "inf" or "-inf" of the values that are not finite."""
    return {name: str(float(value)) for name, value in values.items() if not math.isfinite(value)}


class MetricsLogger:
    """Writes records on one rank; on the others every method does nothing.

    ``<run_dir>/metrics.jsonl`` is appended to, so a resumed run goes on in the same file, from which records of later steps were taken
    (runtime/later_steps.py). The console prints every ``config.log_every`` steps, and always
    the first and the last step and a record with an evaluation, a note, or a value that is not finite; the files get every
    record.

    Raises ValueError on the writer when ``config.wandb_project`` is set and wandb is not installed.
    """

    def __init__(
        self,
        run_dir: Path,
        config: RunConfig,
        *,
        is_writer: bool,
        total_steps: int | None = None,
        first_step: int = 1,
    ) -> None:
        self._is_writer = is_writer
        self._log_every = max(1, config.log_every)
        self._total_steps = total_steps
        self._path = Path(run_dir) / METRICS_FILE
        self._closed = False
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not is_writer:
            return
        run_dir = self._path.parent
        if config.wandb_project is not None:
            self._wandb = _start_wandb(config.wandb_project, run_dir, goes_on=first_step > 1)
        run_dir.mkdir(parents=True, exist_ok=True)
        if config.tensorboard:
            # Imported here: it takes a second, which the other ranks need not spend.
            from torch.utils.tensorboard import SummaryWriter

            # TensorBoard hides what an earlier process wrote of these steps.
            purge = first_step if first_step > 1 else None
            self._tensorboard = SummaryWriter(log_dir=str(run_dir / "tensorboard"), flush_secs=10, purge_step=purge)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def log(self, record: StepMetrics) -> None:
        """Write one record everywhere. Raises ValueError after ``close``."""
        if not self._is_writer:
            return
        if self._closed:
            raise ValueError(f"MetricsLogger is closed; the record of step {record.step} cannot be written")
        line = json.dumps(json_record(record, time.time()), allow_nan=False) + "\n"
        # Opened for each record: once a step costs nothing, and a killed run loses nothing.
        with writing(self._path, f"metrics of step {record.step}", len(line)), self._path.open("a", encoding="utf-8") as file:
            file.write(line)
        if self._tensorboard is not None:
            with writing(self._path.parent / "tensorboard", f"metrics of step {record.step}"):
                for name, value in _flat(record).items():
                    self._tensorboard.add_scalar(name, value, record.step)
        if self._wandb is not None:
            self._wandb.log(_flat(record), step=record.step)
        if self._is_due(record):
            # tqdm.write keeps a bar on the terminal below the line.
            tqdm.write(console_line(record, self._total_steps), file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Flush and close all files. Safe to call twice."""
        self._closed = True
        tensorboard, self._tensorboard = self._tensorboard, None
        if tensorboard is not None:
            with writing(self._path.parent / "tensorboard", "the last metrics"):
                tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def _is_due(self, record: StepMetrics) -> bool:
        return (
            record.step % self._log_every == 0
            or record.step in (1, self._total_steps)
            or record.note is not None
            or any(name.startswith("eval/") for name in record.values)
            or bool(non_finite(record.values))
        )


def _flat(record: StepMetrics) -> dict[str, float]:
    """Metrics, and seconds as verl's ``timing_s/<phase>``."""
    return {**record.values, **{f"timing_s/{name}": value for name, value in record.seconds.items()}}


def _start_wandb(project: str, run_dir: Path, *, goes_on: bool) -> Any:
    """Begin a run of Weights & Biases, or go on with the one that this folder's run began. Steps that it has already stay as they are."""
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            f"run.wandb_project is {project!r}, but the package wandb is not installed: "
            "`pip install wandb`, or leave run.wandb_project out"
        ) from error
    run_dir.mkdir(parents=True, exist_ok=True)
    known = run_dir / WANDB_FILE
    if not (goes_on and known.exists()):
        known.write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
    run_id = known.read_text(encoding="utf-8").strip()
    return wandb.init(project=project, name=run_dir.name, dir=str(run_dir), id=run_id, resume="allow")

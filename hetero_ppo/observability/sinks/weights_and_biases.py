"""Weights & Biases sink: one run there per run folder."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Self

from hetero_ppo.observability.sinks.base import MetricsSink, SinkSettings, with_timings
from hetero_ppo.types import StepMetrics

if TYPE_CHECKING:
    import wandb

#: File with the id of the folder's run at Weights & Biases.
WANDB_FILE = "wandb_run.txt"


class WandbSink(MetricsSink):
    """Sink that sends every record to ``run.wandb_project``. Steps that the run there already has are not changed."""

    def __init__(self, run: wandb.sdk.wandb_run.Run) -> None:
        """Take the open run.

        Args:
            run: Run at Weights & Biases.
        """
        self._run = run

    @classmethod
    def open(cls, settings: SinkSettings) -> Self | None:
        """Start a run there, or continue the one that this folder's run has started.

        Raises:
            ValueError: ``run.wandb_project`` is set and wandb is not installed.
        """
        project, run_dir = settings.config.wandb_project, settings.run_dir
        if project is None:
            return None
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                f"run.wandb_project is {project!r}, but the package wandb is not installed: "
                "`pip install wandb`, or leave run.wandb_project out"
            ) from error
        run_id = _run_id(run_dir, is_resumed=settings.first_step > 1)
        return cls(wandb.init(project=project, name=run_dir.name, dir=str(run_dir), id=run_id, resume="allow"))

    def write(self, record: StepMetrics) -> None:
        """Send the metrics and the seconds by phase."""
        self._run.log(with_timings(record), step=record.step)

    def close(self) -> None:
        """Wait until everything is sent, and end the run there."""
        self._run.finish()


def _run_id(run_dir: Path, *, is_resumed: bool) -> str:
    """Return the id of the folder's run; a new run gets a new id."""
    run_dir.mkdir(parents=True, exist_ok=True)
    known = run_dir / WANDB_FILE
    if not (is_resumed and known.exists()):
        known.write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
    return known.read_text(encoding="utf-8").strip()

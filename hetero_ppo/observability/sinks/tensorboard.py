"""``<run.dir>/tensorboard``: scalars for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Self

from hetero_ppo.disk import writing
from hetero_ppo.observability.sinks.base import MetricsSink, SinkSettings, with_timings
from hetero_ppo.types import StepMetrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

#: Seconds between two writes of TensorBoard's writer.
FLUSH_S = 10


class TensorBoardSink(MetricsSink):
    """Sink that writes every record as scalars."""

    def __init__(self, folder: Path, writer: SummaryWriter) -> None:
        """Take the open writer.

        Args:
            folder: Folder of the event files.
            writer: TensorBoard's writer into it.
        """
        self._folder = folder
        self._writer = writer

    @classmethod
    def open(cls, settings: SinkSettings) -> Self | None:
        """Open the event file. TensorBoard then hides earlier scalars of the steps that a resumed run does again."""
        if not settings.config.tensorboard:
            return None
        # Imported here: the import takes a second, which the other ranks can save.
        from torch.utils.tensorboard import SummaryWriter

        folder = settings.run_dir / "tensorboard"
        purge = settings.first_step if settings.first_step > 1 else None
        return cls(folder, SummaryWriter(log_dir=str(folder), flush_secs=FLUSH_S, purge_step=purge))

    def write(self, record: StepMetrics) -> None:
        """Write one scalar per metric and per phase."""
        with writing(self._folder, f"metrics of step {record.step}"):
            for name, value in with_timings(record).items():
                self._writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        """Flush and close the event file.

        Raises:
            RunError: The disk is full.
        """
        with writing(self._folder, "the last metrics"):
            self._writer.close()

"""Give the metrics of every step to the sinks of the run.

Names are verl's: ``actor/pg_loss``, ``actor/ppo_kl``, ``actor/entropy``, ``actor/grad_norm``, ``critic/vf_loss``,
``critic/vf_explained_var``, ``reward/mean``, ``response_length/mean``, ``kl/reference``, ``timing_s/<phase>``, ...
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Self

from hetero_ppo.config.schema import RunConfig
from hetero_ppo.observability.sinks.base import MetricsSink, SinkSettings
from hetero_ppo.observability.sinks.registry import SINKS
from hetero_ppo.types import StepMetrics


class MetricsLogger:
    """Logger that writes records to the sinks of the run, on the writer's rank. On other ranks it has no sinks and does nothing."""

    def __init__(
        self,
        run_dir: Path,
        config: RunConfig,
        *,
        is_writer: bool,
        total_steps: int | None = None,
        first_step: int = 1,
    ) -> None:
        """Take the run's settings. ``with`` opens the sinks.

        Args:
            run_dir: Folder of the run.
            config: Options of the run, which choose the sinks.
            is_writer: Whether this rank writes.
            total_steps: Steps of the run; None: unknown.
            first_step: First step that will be logged, counted from 1.
        """
        self._is_writer = is_writer
        self._settings = SinkSettings(Path(run_dir), config, total_steps, first_step)
        self._sinks: list[MetricsSink] = []
        self._stack = contextlib.ExitStack()
        self._is_open = False

    def __enter__(self) -> Self:
        """Open the sinks.

        Raises:
            ValueError: The options ask for a sink that cannot be opened.
        """
        with contextlib.ExitStack() as stack:
            for kind in SINKS if self._is_writer else ():
                sink = kind.open(self._settings)
                if sink is not None:
                    stack.callback(sink.close)
                    self._sinks.append(sink)
            self._stack = stack.pop_all()
        self._is_open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_open = False
        self._sinks = []
        self._stack.__exit__(kind, error, traceback)

    def log(self, record: StepMetrics) -> None:
        """Write one record to every sink.

        Args:
            record: Metrics, seconds and note of a step.

        Raises:
            ValueError: The logger is closed.
            RunError: The disk is full.
        """
        if not self._is_open:
            raise ValueError(
                f"MetricsLogger is closed; the record of step {record.step} cannot be written. Log inside its with block"
            )
        for sink in self._sinks:
            sink.write(record)

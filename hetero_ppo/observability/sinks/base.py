"""Interface of the sinks of metrics."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from hetero_ppo.config.schema import RunConfig
from hetero_ppo.types import StepMetrics


@dataclass(frozen=True)
class SinkSettings:
    """Settings of a run that a sink may need."""

    run_dir: Path
    config: RunConfig
    total_steps: int | None = None  # steps of the run; None: unknown
    first_step: int = 1  # first step that this process logs, counted from 1; above 1 the run was resumed


class MetricsSink(ABC):
    """A destination of the records of a run. It exists only on the writer's rank."""

    @classmethod
    @abstractmethod
    def open(cls, settings: SinkSettings) -> Self | None:
        """Open the sink of a run.

        Args:
            settings: Folder, options and length of the run.

        Returns:
            The sink; None if the options switch it off.

        Raises:
            ValueError: The options ask for the sink but it cannot be opened. The message names the option and the fix.
        """

    @abstractmethod
    def write(self, record: StepMetrics) -> None:
        """Write the metrics of one step.

        Args:
            record: Metrics, seconds and note of the step.

        Raises:
            RunError: The disk is full.
        """

    def close(self) -> None:
        """Flush and release what ``open`` opened. It is called once; a sink that keeps nothing open inherits this."""


def non_finite(values: Mapping[str, float]) -> dict[str, str]:
    """Return name -> "nan", "inf" or "-inf" for the values that are not finite."""
    return {name: str(float(value)) for name, value in values.items() if not math.isfinite(value)}


def with_timings(record: StepMetrics) -> dict[str, float]:
    """Return the metrics together with the seconds as verl's ``timing_s/<phase>``."""
    return {**record.values, **{f"timing_s/{name}": value for name, value in record.seconds.items()}}

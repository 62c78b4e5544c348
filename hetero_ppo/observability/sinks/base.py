"""The interface of a sink of metrics."""

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
    """What a sink may need to know of its run."""

    run_dir: Path
    config: RunConfig
    total_steps: int | None = None  # of the run; None: unknown
    first_step: int = 1  # that this process logs, counted from 1; above 1 the run is a resumed one


class MetricsSink(ABC):
    """Writes the records of a run to one place. It exists on the writer's rank only."""

    @classmethod
    @abstractmethod
    def open(cls, settings: SinkSettings) -> Self | None:
        """Open the sink of a run.

        Args:
            settings: The run's folder, options and length.

        Returns:
            The sink; None where the options switch it off.

        Raises:
            ValueError: The options ask for the sink and it cannot be opened. The message names the option and the fix.
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
        """Flush and release what ``open`` opened. Called once; a sink that keeps nothing open inherits this."""


def non_finite(values: Mapping[str, float]) -> dict[str, str]:
    """Return name -> "nan", "inf" or "-inf" for the values that are not finite."""
    return {name: str(float(value)) for name, value in values.items() if not math.isfinite(value)}


def with_timings(record: StepMetrics) -> dict[str, float]:
    """Return the metrics, and the seconds as verl's ``timing_s/<phase>``."""
    return {**record.values, **{f"timing_s/{name}": value for name, value in record.seconds.items()}}

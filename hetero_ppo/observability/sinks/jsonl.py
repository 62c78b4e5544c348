"""``<run.dir>/metrics.jsonl``: one JSON object per step."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, Self

from hetero_ppo.disk import writing
from hetero_ppo.observability.sinks.base import MetricsSink, SinkSettings, non_finite
from hetero_ppo.types import StepMetrics

#: File of the run folder with one JSON object per logged record.
METRICS_FILE = "metrics.jsonl"


class JsonlSink(MetricsSink):
    """Sink that appends every record to the file of the run folder.

    A resumed run continues in the same file, from which ``runtime/later_steps.py`` has removed the records of later steps.
    """

    def __init__(self, path: Path) -> None:
        """Take the file's path.

        Args:
            path: File to append to; its folder exists.
        """
        self._path = path

    @classmethod
    def open(cls, settings: SinkSettings) -> Self:
        """Make the run folder if it does not exist."""
        settings.run_dir.mkdir(parents=True, exist_ok=True)
        return cls(settings.run_dir / METRICS_FILE)

    def write(self, record: StepMetrics) -> None:
        """Append one line. The file is opened for each record: once a step this costs nothing, and a killed run loses nothing."""
        line = json.dumps(json_record(record, time.time()), allow_nan=False) + "\n"
        with (
            writing(self._path, f"metrics of step {record.step}", len(line)),
            self._path.open("a", encoding="utf-8") as file,
        ):
            file.write(line)


def json_record(record: StepMetrics, now: float) -> dict[str, Any]:
    """Return the object of one line: step, time, metrics, seconds by phase.

    JSON has no NaN or infinity: such a value is null, and ``non_finite`` has its name.

    Args:
        record: Metrics of a step.
        now: Unix time, in seconds.
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

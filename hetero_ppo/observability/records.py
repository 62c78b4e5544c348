"""Read what a run wrote: metrics.jsonl, config.yaml, eval_before.json, eval_after.json, the memory ledger, traces."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hetero_ppo.observability.jsonl import whole_lines
from hetero_ppo.observability.sinks.jsonl import METRICS_FILE
from hetero_ppo.observability.timers import TOTAL
from hetero_ppo.observability.trace import StepTrace, newest_trace

CONFIG_FILE = "config.yaml"
EVAL_BEFORE_FILE = "eval_before.json"
EVAL_AFTER_FILE = "eval_after.json"
LEDGER_FILE = "memory_ledger.json"


@dataclass(frozen=True)
class Series:
    """Values of one metric over the steps that have it."""

    steps: list[int]
    values: list[float]  # NaN if the run wrote null

    @property
    def last(self) -> float:
        return self.values[-1]


@dataclass(frozen=True)
class Sample:
    """One held-out answer."""

    prompt: str
    response: str
    label: Any
    score: float | None  # None: the reward function failed for it

    @property
    def score_text(self) -> str:
        return "no score" if self.score is None else f"score {self.score:.2f}"


@dataclass(frozen=True)
class EvaluationRecord:
    """One held-out evaluation of a PPO run."""

    accuracy: float | None  # accuracy of sampled answers, 0 to 1; None: the run has no held-out check
    greedy_accuracy: float | None  # accuracy of greedy answers, 0 to 1
    reward: float
    kl: float  # KL to the reference, nats per response
    response_length: float  # tokens
    num_prompts: int
    samples: list[Sample] = field(default_factory=list)


@dataclass(frozen=True)
class RunRecord:
    """Everything that a report needs to know about one run."""

    dir: Path
    kind: str  # "sft", "rm" or "ppo"; "run" for metrics of none of them
    config_text: str | None
    num_steps: int  # highest step in the file
    seconds_total: float
    series: dict[str, Series]
    seconds: dict[str, Series]  # phase -> seconds; nested phases are "parent/child", and there is "total"
    notes: list[tuple[int, str]]
    before: EvaluationRecord | None
    after: EvaluationRecord | None
    ledger: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)  # phase -> role -> kind -> device bytes
    trace: StepTrace | None = None  # trace of the highest step that was traced

    @property
    def num_non_finite(self) -> int:
        return sum(not math.isfinite(value) for series in self.series.values() for value in series.values)


def read_run(path: Path) -> RunRecord:
    """Read a run folder, or a metrics.jsonl file and its folder.

    If a step appears twice, its later record counts. A last line that a kill has cut is ignored.

    Raises:
        ValueError: A file is missing or malformed; the message names file and line.
    """
    metrics_path = path if path.suffix == ".jsonl" else path / METRICS_FILE
    records = _read_metrics(metrics_path)
    run_dir = metrics_path.parent
    config_path = run_dir / CONFIG_FILE
    config_text = config_path.read_text(encoding="utf-8") if config_path.exists() else None
    steps = sorted(records)
    seconds = _to_series({step: records[step]["seconds"] for step in steps})
    if TOTAL in seconds:
        seconds_total = sum(seconds[TOTAL].values)
    else:
        times = [records[step]["time"] for step in steps]
        seconds_total = max(times) - min(times)
    series = _to_series({step: records[step]["metrics"] for step in steps})
    return RunRecord(
        dir=run_dir,
        kind=_kind(series),
        config_text=config_text,
        num_steps=steps[-1],
        seconds_total=seconds_total,
        series=series,
        seconds=seconds,
        notes=[(step, note) for step in steps for note in records[step]["notes"]],
        before=read_evaluation(run_dir / EVAL_BEFORE_FILE),
        after=read_evaluation(run_dir / EVAL_AFTER_FILE),
        ledger=_read_ledger(run_dir / LEDGER_FILE),
        trace=newest_trace(run_dir),
    )


def _read_ledger(path: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Return the bytes that the run's first step held on the device, by phase; {} if the run wrote none."""
    return json.loads(path.read_text(encoding="utf-8"))["phases"] if path.exists() else {}


def read_evaluation(path: Path) -> EvaluationRecord | None:
    """Read one evaluation; None if there is no such file.

    Raises:
        ValueError: The file is malformed.
    """
    if not path.exists():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return EvaluationRecord(
            accuracy=None if raw["accuracy"] is None else float(raw["accuracy"]),
            greedy_accuracy=None if raw["greedy_accuracy"] is None else float(raw["greedy_accuracy"]),
            reward=math.nan
            if raw["reward"] is None
            else float(raw["reward"]),  # null: the function failed for every answer
            kl=float(raw["kl"]),
            response_length=float(raw["response_length"]),
            num_prompts=int(raw["num_prompts"]),
            samples=[
                Sample(
                    str(row["prompt"]),
                    str(row["response"]),
                    row["label"],
                    None if row["score"] is None else float(row["score"]),
                )
                for row in raw["samples"]
            ],
        )
    except KeyError as error:
        raise ValueError(f"{path}: the field {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not an evaluation ({error})") from error


def _kind(series: dict[str, Series]) -> str:
    """Return the kind of run from metrics that only this kind has. This works for a metrics.jsonl without its config too."""
    owners = (("actor/", "ppo"), ("critic/", "ppo"), ("rm/", "rm"), ("sft/", "sft"))
    return next((kind for prefix, kind in owners if any(name.startswith(prefix) for name in series)), "run")


def _read_metrics(path: Path) -> dict[int, dict[str, Any]]:
    """Return step -> merged record: metrics, seconds, time, notes."""
    if not path.exists():
        raise ValueError(
            f"{path}: no such file. --run takes a run's folder (run.dir of its config) or its {METRICS_FILE}"
        )
    records: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            row = json.loads(line)
            record = records.setdefault(int(row["step"]), {"metrics": {}, "seconds": {}, "notes": []})
            record["metrics"].update(row["metrics"])
            record["seconds"].update(row["seconds"])
            record["time"] = float(row["time"])
            if "note" in row:
                record["notes"].append(str(row["note"]))
        except KeyError as error:
            raise ValueError(f"{path}, line {number}: the field {error} is missing") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: not a metrics record ({error})") from error
    if not records:
        raise ValueError(f"{path}: empty, the run logged no step")
    return records


def _to_series(rows: dict[int, dict[str, float | None]]) -> dict[str, Series]:
    series: dict[str, Series] = {}
    for step, row in rows.items():
        for name, value in row.items():
            target = series.setdefault(name, Series([], []))
            target.steps.append(step)
            target.values.append(math.nan if value is None else value)
    return series

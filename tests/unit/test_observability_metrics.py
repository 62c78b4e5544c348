from __future__ import annotations

import io
import json
import math
import sys
import types
import time
from pathlib import Path

import pytest

from hetero_ppo.config.schema import RunConfig
from hetero_ppo.observability import metrics
from hetero_ppo.observability.logs import console_logging
from hetero_ppo.observability.metrics import MetricsLogger
from hetero_ppo.observability.progress import PlainProgress, progress
from hetero_ppo.observability.sinks.base import MetricsSink, SinkSettings
from hetero_ppo.observability.sinks.console import console_line
from hetero_ppo.observability.sinks.registry import SINKS
from hetero_ppo.observability.timers import PhaseTimer, top_level
from hetero_ppo.types import StepMetrics


def read_lines(path: Path) -> list[dict]:
    def refuse(text: str) -> float:
        raise AssertionError(f"{text} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_jsonl_has_one_object_per_record_and_null_for_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig(dir=str(tmp_path), tensorboard=False)
    with console_logging(), MetricsLogger(tmp_path, config, is_writer=True) as logger:
        logger.log(StepMetrics(1, {"reward/mean": 0.5, "actor/pg_loss": math.nan}, {"rollout": 1.25, "total": 2.0}))
        logger.log(StepMetrics(2, {"reward/mean": math.inf}, note="resumed"))
    first, second = read_lines(tmp_path / "metrics.jsonl")
    assert first["step"] == 1
    assert first["metrics"] == {"reward/mean": 0.5, "actor/pg_loss": None}
    assert first["seconds"] == {"rollout": 1.25, "total": 2.0}
    assert first["non_finite"] == {"actor/pg_loss": "nan"}
    assert abs(first["time"] - time.time()) < 60
    assert second["non_finite"] == {"reward/mean": "inf"} and second["note"] == "resumed"
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2
    assert "NOT FINITE: actor/pg_loss = nan" in out[0]
    assert "resumed" not in out[1]  # a warning has a line of its own


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    config = RunConfig(dir=str(tmp_path), tensorboard=False)
    for step in (1, 2):
        with MetricsLogger(tmp_path, config, is_writer=True) as logger:
            logger.log(StepMetrics(step, {"train/loss": 1.0}))
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_non_writer_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig(dir=str(tmp_path / "run"), wandb_project="p")
    with console_logging(), MetricsLogger(tmp_path / "run", config, is_writer=False) as logger:
        logger.log(StepMetrics(1, {"train/loss": 1.0}))
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_log_every_thins_the_console_but_not_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig(dir=str(tmp_path), tensorboard=False, log_every=3)
    with console_logging(), MetricsLogger(tmp_path, config, is_writer=True, total_steps=7) as logger:
        for step in range(1, 8):
            logger.log(StepMetrics(step, {"train/loss": 1.0} | ({"eval/accuracy": 0.5} if step == 4 else {})))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[0].split() for line in lines] == [["step", f"{n}/7"] for n in (1, 3, 4, 6, 7)]
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 7
    assert not (tmp_path / "tensorboard").exists()


def test_console_lines_align() -> None:
    names = ("reward/mean", "kl/reference", "actor/pg_loss", "critic/vf_loss")
    lines = [console_line(StepMetrics(step, {name: scale for name in names})) for step, scale in ((9, 0.1), (10, -9.9))]
    assert len(lines[0]) == len(lines[1])
    assert [i for i, c in enumerate(lines[0]) if c == "|"] == [i for i, c in enumerate(lines[1]) if c == "|"]


def test_tensorboard_gets_metrics_and_timings(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, RunConfig(dir=str(tmp_path)), is_writer=True) as logger:
        logger.log(StepMetrics(4, {"reward/mean": 0.25}, {"rollout": 2.0}))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (reward,) = events.Scalars("reward/mean")
    assert (reward.step, reward.value) == (4, 0.25)
    assert events.Scalars("timing_s/rollout")[0].value == 2.0


def test_a_resumed_run_goes_on_in_its_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, str]] = []
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **given: started.append(given) or types.SimpleNamespace(finish=lambda: None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for folder, first_step in (("a", 1), ("a", 4), ("b", 4), ("a", 1)):
        config = RunConfig(dir=str(tmp_path / folder), wandb_project="demo", tensorboard=False)
        with MetricsLogger(tmp_path / folder, config, is_writer=True, first_step=first_step):
            pass
    first, resumed, elsewhere, again = (given["id"] for given in started)
    assert first == resumed and len({first, elsewhere, again}) == 3
    assert {(given["project"], given["resume"]) for given in started} == {("demo", "allow")}


def test_wandb_asked_for_and_missing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = RunConfig(dir=str(tmp_path), wandb_project="demo")
    with (
        pytest.raises(ValueError, match="run.wandb_project.*pip install wandb"),
        MetricsLogger(tmp_path, config, is_writer=True),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_log_after_close_is_an_error(tmp_path: Path) -> None:
    for is_writer in (True, False):
        with MetricsLogger(tmp_path, RunConfig(dir=str(tmp_path), tensorboard=False), is_writer=is_writer) as logger:
            pass
        with pytest.raises(ValueError, match="closed; the record of step 1"):
            logger.log(StepMetrics(1, {}))


class MemorySink(MetricsSink):
    """Keeps the steps that it gets, and what happens to it."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    @classmethod
    def open(cls, settings: SinkSettings) -> MemorySink | None:
        return None if settings.config.seed == 0 else cls(EVENTS)

    def write(self, record: StepMetrics) -> None:
        self.events.append(f"step {record.step}")

    def close(self) -> None:
        self.events.append("closed")


class BrokenSink(MemorySink):
    """Cannot be opened."""

    @classmethod
    def open(cls, settings: SinkSettings) -> MemorySink | None:
        raise ValueError("run.sink: no")


EVENTS: list[str] = []


def test_a_new_sink_is_one_class_and_its_place_in_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "SINKS", (*SINKS, MemorySink))
    EVENTS.clear()
    for seed in (0, 1):
        with MetricsLogger(
            tmp_path, RunConfig(dir=str(tmp_path), tensorboard=False, seed=seed), is_writer=True
        ) as logger:
            logger.log(StepMetrics(7, {"train/loss": 1.0}))
    assert EVENTS == ["step 7", "closed"]
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [7, 7]


def test_sinks_that_are_open_are_closed_when_a_later_one_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "SINKS", (MemorySink, BrokenSink))
    EVENTS.clear()
    with pytest.raises(ValueError, match="run.sink"), MetricsLogger(tmp_path, RunConfig(dir="r"), is_writer=True):
        pass
    assert EVENTS == ["closed"]


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_nest_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    monkeypatch.setattr(time, "perf_counter", clock)
    calls: list[float] = []
    timer = PhaseTimer(synchronize=lambda: calls.append(clock.now))
    for _ in range(2):
        with timer.phase("update"):
            clock.now += 1.0
            with timer.phase("actor"):
                clock.now += 2.0
    with pytest.raises(KeyError), timer.phase("score"):
        clock.now += 0.5
        raise KeyError
    clock.now += 0.25
    assert timer.collect() == {"update": 6.0, "update/actor": 4.0, "score": 0.5, "total": 6.75}
    assert len(calls) == 1 + 2 * 4 + 2 + 2  # once for each reading of the clock
    clock.now += 3.0
    assert timer.collect() == {"total": 3.0}


def test_phase_misuse() -> None:
    timer = PhaseTimer()
    for name in ("", "a/b", "total"):
        with pytest.raises(ValueError, match="phase name"), timer.phase(name):
            pass
    with timer.phase("rollout"), pytest.raises(RuntimeError, match="inside the phase 'rollout'"):
        timer.collect()


def test_top_level_adds_what_is_left() -> None:
    assert top_level({"a": 1.0, "a/b": 0.5, "c": 2.0, "total": 4.0}) == {"a": 1.0, "c": 2.0, "other": 1.0}


def test_plain_progress_prints_lines_without_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    monkeypatch.setattr(time, "perf_counter", clock)
    out = io.StringIO()
    for _ in PlainProgress(range(8), 8, "score", out, interval_s=10.0):
        clock.now += 4.0
    lines = out.getvalue().splitlines()
    assert lines == [
        "score: 3/8 (38 %), 12 s, 20 s left, 0.25/s",
        "score: 6/8 (75 %), 24 s, 8 s left, 0.25/s",
        "score: 8/8 (100 %), 32 s, 0.25/s",
    ]


def test_plain_progress_does_not_say_its_end_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    monkeypatch.setattr(time, "perf_counter", clock)
    out = io.StringIO()
    for _ in PlainProgress(range(2), 2, "PPO", out, interval_s=10.0):
        clock.now += 6.0
    assert out.getvalue().splitlines() == ["PPO: 2/2 (100 %), 12 s, 0.17/s"]


def test_progress_is_silent_on_other_ranks_and_in_short_loops(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert list(progress([1, 2, 3], "x")) == [1, 2, 3]
    monkeypatch.setenv("RANK", "0")
    assert list(progress([1, 2, 3], "x")) == [1, 2, 3]
    with progress(total=5, description="y") as bar:
        bar.update(5)
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out == ""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from hetero_ppo.observability.timers import PhaseTimer
from hetero_ppo.observability.trace import (
    COPY_IN,
    GENERATOR,
    MERGE_GAP_S,
    TRAINER,
    Span,
    StepTrace,
    TraceRecorder,
    busy_seconds,
    newest_trace,
    read_trace,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def recorder(folder: Path, clock: Clock | None = None, **options: Any) -> TraceRecorder:
    given = {} if clock is None else {"clock": clock}
    return TraceRecorder(folder / "trace", every=1, **given, **options)


def synthetic_step(folder: Path, step: int = 12) -> Path:
    """Write a step of ten seconds: six of generation, and an actor's turn of three with copies and an optimizer step."""
    clock = Clock()
    trace = recorder(folder, clock, rank=3)
    trace.begin(step)
    with trace.span(TRAINER, "rollout"), trace.span(GENERATOR, "generate"):
        clock.now = 106.0
    with trace.span("actor", "train_actor"):
        clock.now = 107.0
        with trace.span("actor", "optimizer step"):
            clock.now = 109.0
    trace.add(COPY_IN, "critic params", 106.5, 107.25, role="critic", kind="params", bytes=4096, blocks=1)
    clock.now = 110.0
    path = trace.end()
    assert path is not None
    return path


def test_the_file_is_in_chromes_format(tmp_path: Path) -> None:
    path = synthetic_step(tmp_path)
    assert path == tmp_path / "trace" / "step_0000012.json"
    events = json.loads(path.read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert list(names.values()) == [TRAINER, GENERATOR, "actor", COPY_IN]
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["rank 3"]
    spans = [e for e in events if e["ph"] == "X"]
    assert len(spans) == 5 and {e["ph"] for e in events} == {"X", "M"}
    for event in spans:
        assert {"name", "ph", "ts", "dur", "pid", "tid"} <= event.keys()
        assert event["pid"] == 3 and event["tid"] in names and event["dur"] >= 0
    copy = next(e for e in spans if names[e["tid"]] == COPY_IN)
    assert (copy["ts"], copy["dur"]) == (6_500_000, 750_000)  # microseconds since the step began
    assert copy["args"] == {"role": "critic", "kind": "params", "bytes": 4096, "blocks": 1}
    outer, inner = (next(e for e in spans if e["name"] == name) for name in ("train_actor", "optimizer step"))
    assert outer["tid"] == inner["tid"]
    assert outer["ts"] < inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]
    assert spans.index(outer) < spans.index(inner)


def test_what_is_read_is_what_was_recorded(tmp_path: Path) -> None:
    trace = read_trace(synthetic_step(tmp_path))
    assert (trace.step, trace.rank, trace.seconds) == (12, 3, 10.0)
    assert trace.lanes() == [TRAINER, GENERATOR, "actor", COPY_IN]
    idle = {lane: trace.idle_share(lane) for lane in trace.lanes()}
    assert idle == pytest.approx({TRAINER: 0.4, GENERATOR: 0.4, "actor": 0.7, COPY_IN: 0.925})
    assert trace.idle_share("critic") == 1.0


def test_idle_share_merges_overlaps() -> None:
    def spans(*pairs: tuple[float, float]) -> list[Span]:
        return [Span("actor", "x", start, end) for start, end in pairs]

    assert busy_seconds([]) == 0
    assert busy_seconds(spans((5, 6), (0, 4), (1, 2))) == 5  # one inside another, out of order
    assert busy_seconds(spans((0, 2), (1, 3), (3, 4), (6, 8))) == 6  # overlapping, touching, apart
    other = Span("critic", "x", 0, 8)
    assert StepTrace(1, 0, 8.0, [*spans((0, 2), (1, 3)), other]).idle_share("actor") == 0.625


def test_steps_that_are_due() -> None:
    due = TraceRecorder(Path("x"), every=10, first_step=4)
    assert [step for step in range(4, 31) if due.is_due(step)] == [4, 5, 10, 20, 30]
    assert not TraceRecorder(Path("x")).is_due(1)
    assert not TraceRecorder(every=1).is_due(1)


def test_nothing_is_kept_outside_of_a_step(tmp_path: Path) -> None:
    trace = TraceRecorder(tmp_path / "trace", every=10)
    for step in (1, 2, 3):
        with trace.span(GENERATOR, "before"):
            pass
        trace.begin(step)
        with trace.span(GENERATOR, "generate"):
            pass
        path = trace.end()
        assert (path is None) == (step == 3)
    newest = newest_trace(tmp_path)
    assert newest is not None and newest.step == 2
    assert [span.name for span in newest.spans] == ["generate"]


def test_work_under_way_at_the_ends_of_a_step_is_cut(tmp_path: Path) -> None:
    clock = Clock()
    trace = recorder(tmp_path, clock)
    with trace.span(COPY_IN, "actor params"):
        clock.now += 1
        trace.begin(1)
        clock.now += 2
    with trace.span(COPY_IN, "critic params", bytes=0) as args:
        clock.now += 3
        trace.end()
        trace.begin(2)
        clock.now += 4
        args["bytes"] = 7
    trace.end()
    first, second = (read_trace(tmp_path / "trace" / f"step_000000{step}.json") for step in (1, 2))
    assert [(s.name, s.start, s.end) for s in first.spans] == [("actor params", 0, 2), ("critic params", 2, 5)]
    assert [(s.start, s.end, s.args) for s in second.spans] == [(0, 4, {"bytes": 7})]


def test_blocks_that_follow_each_other_are_one_span(tmp_path: Path) -> None:
    trace = recorder(tmp_path, Clock())
    trace.begin(1)
    near, far = MERGE_GAP_S / 2, MERGE_GAP_S * 2
    at = 100.0
    for name, gap in (("a", 0), ("a", near), ("a", far), ("b", near), ("b", near)):
        trace.add(COPY_IN, name, at + gap, at + gap + 1, role=name, bytes=5, blocks=1)
        at += gap + 1
    for _ in range(2):
        trace.add(GENERATOR, "generate", 100.0, 100.0)
    path = trace.end()
    assert path is not None
    spans = read_trace(path).spans
    copies = [(s.name, s.args["bytes"], s.args["blocks"]) for s in spans if s.lane == COPY_IN]
    assert copies == [("a", 10, 2), ("a", 5, 1), ("b", 10, 2)]
    assert sum(s.lane == GENERATOR for s in spans) == 2


def test_a_span_ends_with_an_error(tmp_path: Path) -> None:
    trace = recorder(tmp_path)
    trace.begin(1)
    with pytest.raises(KeyError), trace.span(GENERATOR, "generate"):
        raise KeyError
    trace.end()
    newest = newest_trace(tmp_path)
    assert newest is not None and len(newest.spans) == 1


def test_threads_lose_nothing(tmp_path: Path) -> None:
    trace = recorder(tmp_path)
    trace.begin(1)

    def work(lane: str) -> None:
        for number in range(200):
            with trace.span(lane, "outer"), trace.span(lane, "inner", number=number):
                pass

    threads = [threading.Thread(target=work, args=(f"lane {n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    trace.end()
    newest = newest_trace(tmp_path)
    assert newest is not None and len(newest.spans) == 4 * 400
    for n in range(4):
        spans = [span for span in newest.spans if span.lane == f"lane {n}"]
        assert [s.args["number"] for s in spans if s.name == "inner"] == list(range(200))
        for outer, inner in zip(spans[::2], spans[1::2], strict=True):  # nested, and in order
            assert outer.start <= inner.start and inner.end <= outer.end + 1e-9


def test_phases_are_spans_of_the_trainer(tmp_path: Path) -> None:
    trace = recorder(tmp_path)
    timer = PhaseTimer(trace=trace)
    trace.begin(1)
    with timer.phase("experience"), timer.phase("scores"):
        pass
    seconds = timer.collect()
    trace.end()
    newest = newest_trace(tmp_path)
    assert newest is not None
    assert [(span.lane, span.name) for span in newest.spans] == [(TRAINER, "experience"), (TRAINER, "scores")]
    assert newest.spans[0].end - newest.spans[0].start == pytest.approx(seconds["experience"], abs=2e-9)


def test_malformed_files_are_named(tmp_path: Path) -> None:
    path = synthetic_step(tmp_path)
    raw = json.loads(path.read_text())
    for text, message in (("{", "not a trace"), (json.dumps({**raw, "otherData": {}}), "'step' is missing")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"step_0000012.*{message}"):
            newest_trace(tmp_path)
    assert newest_trace(tmp_path / "nowhere") is None

"""Trace of a step: spans on lanes, written in Chrome's trace event format, which Perfetto and chrome://tracing open.

A lane is something that can be busy or idle: the generator, a role, a copy direction, the trainer. Source of the format: "Trace Event
Format", Google, complete ("X") and metadata ("M") events; times are microseconds since the step began.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hetero_ppo.disk import writing
from hetero_ppo.observability.json_text import json_text
from hetero_ppo.observability.jsonl import write_whole
from hetero_ppo.step.roles import ROLE_SECTIONS

Args = dict[str, int | str]

TRAINER, GENERATOR, COPY_IN, COPY_OUT = "trainer", "generator", "copy in", "copy out"
#: Lanes from top to bottom; lanes that a step did not use are left out.
LANES = (TRAINER, GENERATOR, *ROLE_SECTIONS, COPY_IN, COPY_OUT)

TRACE_FOLDER = "trace"

#: Spans on the trainer's lane in which the computation waited.
WAIT = "wait for copies"
WAIT_FOR_GENERATOR = "wait for the generator"
#: Names of the spans in which their lane is idle.
WAITS = frozenset({WAIT, WAIT_FOR_GENERATOR})

#: On a copy lane, blocks of one role and kind with a shorter gap between them become one span. Otherwise hundreds of small tensors would
#: make the file large and the picture grey. The gaps count as busy.
MERGE_GAP_S = 2e-4

#: Number of first steps of a run that are always traced: the first one has the warm-up, the second one has not.
FIRST_STEPS = 2


@dataclass(frozen=True)
class Span:
    """One piece of work on a lane."""

    lane: str
    name: str
    start: float  # seconds: of the monotonic clock in a recorder, since the step began in a file
    end: float
    args: Args = field(default_factory=dict)


@dataclass(frozen=True)
class StepTrace:
    """Trace of one step, as its file has it."""

    step: int
    rank: int
    seconds: float  # wall time of the step
    spans: list[Span]  # sorted by start, in seconds since the step began

    def lanes(self) -> list[str]:
        """Return the lanes with spans: those of ``LANES`` in its order, then others."""
        return _ordered_lanes(self.spans)

    def idle_share(self, lane: str) -> float:
        """Return the share of the step, 0 to 1, that no span of the lane covers, or that a wait covers. Nested spans count once."""
        spans = [span for span in self.spans if span.lane == lane]
        waits = [span for span in spans if span.name in WAITS]
        return 1.0 - (busy_seconds(spans) - busy_seconds(waits)) / self.seconds


class TraceRecorder:
    """Recorder that collects the spans of a step from all threads, and writes the steps that are due.

    In a step that is not due, a span costs two readings of the clock and a lock. A span that crosses the beginning or the end of a step is cut
    there.
    """

    def __init__(
        self,
        folder: Path | None = None,
        every: int = 0,
        first_step: int = 1,
        rank: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Take the settings; nothing is recorded yet.

        Args:
            folder: Folder of the files; None: nothing is written.
            every: Number of steps between traces; 0: no traces.
            first_step: First step of the run, counted from 1.
            rank: Rank that records; the process in the file.
            clock: Clock, in monotonic seconds.
        """
        self._folder = folder
        self._every = every
        self._first_step = first_step
        self._rank = rank
        self._clock = clock
        self._lock = threading.Lock()
        self._step: int | None = None  # step that is being recorded
        self._began = 0.0
        self._spans: list[Span] = []
        self._last_copy: dict[str, int] = {}  # lane -> index of its last span, for copy lanes
        self._open: dict[int, Span] = {}  # identity of the args -> span

    def is_due(self, step: int) -> bool:
        """Return True for the run's first steps and for every ``every``-th step."""
        if self._folder is None or self._every == 0:
            return False
        return step < self._first_step + FIRST_STEPS or step % self._every == 0

    def begin(self, step: int) -> None:
        """Start recording if ``step`` (counted from 1) is due."""
        with self._lock:
            self._step = step if self.is_due(step) else None
            self._began = self._clock()
            self._spans, self._last_copy = [], {}

    def end(self) -> Path | None:
        """Stop recording and write what was recorded since ``begin``. Return the file; None if the step was not due.

        Raises:
            RunError: The disk is full.
        """
        with self._lock:
            step, self._step = self._step, None
            if step is None:
                return None
            now = self._clock()
            spans = self._spans + [replace(span, end=now, args=dict(span.args)) for span in self._open.values()]
            trace = StepTrace(step, self._rank, now - self._began, _since(self._began, spans))
        assert self._folder is not None  # otherwise no step is due
        path = self._folder / f"step_{step:07d}.json"
        text = json_text(chrome_trace(trace))
        with writing(path, f"trace of step {step}", len(text)):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)
        return path

    @contextmanager
    def span(self, lane: str, name: str, **args: int | str) -> Iterator[Args]:
        """Record the body as a span on a lane. Yields the span's arguments, which the body may add to. Errors end the span too.

        Spans of one lane must be nested or separate, so only one thread may write to a lane at a time.
        """
        span = Span(lane, name, self._clock(), 0.0, args)
        if self._step is not None:
            with self._lock:
                self._open[id(args)] = span
        try:
            yield args
        finally:
            end = self._clock()
            with self._lock:
                self._open.pop(id(args), None)
                if self._step is not None:
                    self._keep(replace(span, start=max(span.start, self._began), end=end))

    def add(self, lane: str, name: str, start: float, end: float, **args: int | str) -> None:
        """Add a span that has ended, in times of the recorder's clock."""
        with self._lock:
            if self._step is not None:
                self._keep(Span(lane, name, max(start, self._began), end, args))

    def _keep(self, span: Span) -> None:
        """Keep a span, or merge it into the last one of a copy lane. The caller holds the lock."""
        if span.lane in (COPY_IN, COPY_OUT):
            index = self._last_copy.get(span.lane)
            if index is not None:
                last = self._spans[index]
                if last.name == span.name and span.start - last.end <= MERGE_GAP_S:
                    self._spans[index] = replace(last, end=span.end, args=_added(last.args, span.args))
                    return
            self._last_copy[span.lane] = len(self._spans)
        self._spans.append(span)


def _added(first: Args, second: Args) -> Args:
    """Return the sums of the numbers in both; texts come from the first."""
    total = dict(first)
    for name, value in second.items():
        before = total.setdefault(name, 0 if isinstance(value, int) else value)
        if isinstance(before, int) and isinstance(value, int):
            total[name] = before + value
    return total


def _since(began: float, spans: Sequence[Span]) -> list[Span]:
    shifted = [replace(span, start=max(span.start, began) - began, end=span.end - began) for span in spans]
    return sorted(shifted, key=lambda span: (span.start, -span.end))  # the outer one of nested spans comes first


def _ordered_lanes(spans: Sequence[Span]) -> list[str]:
    used = dict.fromkeys(span.lane for span in spans)
    return [lane for lane in LANES if lane in used] + [lane for lane in used if lane not in LANES]


def busy_seconds(spans: Sequence[Span]) -> float:
    """Return the seconds that at least one span covers."""
    busy, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        busy += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return busy


def chrome_trace(trace: StepTrace) -> dict[str, object]:
    """Return the step in Chrome's trace event format: a process for the rank, a thread for each lane."""
    threads = {lane: number for number, lane in enumerate(trace.lanes(), start=1)}
    pid = trace.rank
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": f"rank {trace.rank}"}}
    ]
    for lane, tid in threads.items():
        events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": lane}})
        events.append({"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}})
    for span in trace.spans:
        # Whole nanoseconds, so that nested spans stay nested.
        start, end = round(span.start * 1e9), round(span.end * 1e9)
        events.append(
            {
                "ph": "X",
                "name": span.name,
                "cat": span.lane,
                "pid": pid,
                "tid": threads[span.lane],
                "ts": start / 1e3,
                "dur": (end - start) / 1e3,
                "args": span.args,
            }
        )
    other = {"step": trace.step, "rank": trace.rank, "seconds": trace.seconds}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}


def read_trace(path: Path) -> StepTrace:
    """Read a file that a recorder wrote.

    Raises:
        ValueError: The file has another format.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        events, other = raw["traceEvents"], raw["otherData"]
        lanes = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
        spans = [_span(event, lanes[event["tid"]]) for event in events if event["ph"] == "X"]
        return StepTrace(int(other["step"]), int(other["rank"]), float(other["seconds"]), spans)
    except KeyError as error:
        raise ValueError(
            f"{path}: the field {error} is missing; delete the file, or write it again with a run"
        ) from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a trace of a step ({error}); delete the file") from error


def _span(event: dict[str, Any], lane: str) -> Span:
    start, length = round(event["ts"] * 1e3), round(event["dur"] * 1e3)  # nanoseconds, the unit of writing
    return Span(lane, event["name"], start / 1e9, (start + length) / 1e9, event["args"])


def newest_trace(run_dir: Path) -> StepTrace | None:
    """Return the trace of a run's highest traced step; None if there is none.

    Raises:
        ValueError: The file is malformed.
    """
    files = sorted((run_dir / TRACE_FOLDER).glob("step_*.json"))
    return read_trace(files[-1]) if files else None

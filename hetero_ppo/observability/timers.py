"""Measure the seconds of a step by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hetero_ppo.observability.trace import TRAINER, TraceRecorder
from hetero_ppo.observability.watchdog import Watchdog

#: Key of the wall time of the whole step, next to the phases.
TOTAL = "total"


class PhaseTimer:
    """Timer that sums wall seconds of named phases. A phase inside another one is named ``parent/child``.

    If a phase is entered several times in one step, its seconds are summed. A parent's seconds include its children's. The clock is monotonic.
    One timer belongs to one thread.

    ``synchronize`` is called before every reading of the clock. On a GPU it is ``torch.cuda.synchronize``: kernels run behind the Python code,
    so a phase would otherwise end before its work. Phases also become spans of ``trace``, and ``watchdog`` is notified when one begins or ends.
    """

    def __init__(
        self,
        synchronize: Callable[[], None] | None = None,
        trace: TraceRecorder | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self._synchronize = synchronize
        self._trace = trace or TraceRecorder()
        self._watchdog = watchdog
        self._stack: list[str] = []
        self._seconds: dict[str, float] = {}
        self._started = self._now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the body. Its seconds count even if it raises.

        Raises:
            ValueError: ``name`` is empty, contains "/" (which nesting adds), or is "total".
        """
        if not name or "/" in name or name == TOTAL:
            raise ValueError(f"phase name {name!r}: must be non-empty, without '/', and not {TOTAL!r}")
        self._stack.append(name)
        path = "/".join(self._stack)
        self._notify_watchdog()
        start = self._now()
        try:
            yield
        except BaseException:
            if self._watchdog is not None:
                self._watchdog.note_failure(path)
            raise
        finally:
            end = self._now()
            self._seconds[path] = self._seconds.get(path, 0.0) + end - start
            self._trace.add(TRAINER, name, start, end)
            self._stack.pop()
            self._notify_watchdog()

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each finished phase since the last ``collect``, and ``total``: the wall time since then."""
        return {**self._seconds, TOTAL: self._now() - self._started}

    def collect(self) -> dict[str, float]:
        """Return ``seconds()`` and start the next step from zero.

        Raises:
            RuntimeError: It is called inside a phase, whose seconds would be split over two steps.
        """
        if self._stack:
            raise RuntimeError(f"PhaseTimer.collect() inside the phase {'/'.join(self._stack)!r}")
        seconds = self.seconds()
        self._seconds = {}
        self._started = self._now()
        return seconds

    def _notify_watchdog(self) -> None:
        if self._watchdog is not None:
            self._watchdog.note("/".join(self._stack))

    def _now(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return time.perf_counter()


def top_level(seconds: dict[str, float]) -> dict[str, float]:
    """Return the phases without a parent, in order, and ``other``: the rest of the total (0 if there is no total)."""
    phases = {name: value for name, value in seconds.items() if "/" not in name and name != TOTAL}
    if TOTAL in seconds:
        phases["other"] = max(0.0, seconds[TOTAL] - sum(phases.values()))
    return phases

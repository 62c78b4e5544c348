"""Seconds of a step by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hetero_ppo.observability.trace import TRAINER, TraceRecorder
from hetero_ppo.observability.watchdog import Watchdog

#: Key of the wall time of the whole step, beside the phases.
TOTAL = "total"


class PhaseTimer:
    """Adds up wall seconds of named phases; a phase inside another is filed as ``parent/child``.

    A phase that is entered several times in one step adds up. A parent's seconds include its children's. The clock is
    monotonic. One timer belongs to one thread.

    ``synchronize`` is called before every reading of the clock (``torch.cuda.synchronize`` on a GPU, where kernels run
    behind the Python code and a phase would otherwise end before its work does). Phases are spans of ``trace``, too, and
    ``watchdog`` hears of each one's beginning and end.
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
        """Time the body. Seconds are kept even when the body raises.

        Raises ValueError when ``name`` is empty, holds a "/" (nesting writes it), or is "total".
        """
        if not name or "/" in name or name == TOTAL:
            raise ValueError(f"phase name {name!r}: must be non-empty, without '/', and not {TOTAL!r}")
        self._stack.append(name)
        path = "/".join(self._stack)
        self._tell_watchdog()
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
            self._tell_watchdog()

    def seconds(self) -> dict[str, float]:
        """Seconds of each finished phase since the last ``collect``, and ``total``: the wall time since then."""
        return {**self._seconds, TOTAL: self._now() - self._started}

    def collect(self) -> dict[str, float]:
        """Return ``seconds()`` and start the next step from zero.

        Raises RuntimeError inside a phase: its seconds would be split over two steps.
        """
        if self._stack:
            raise RuntimeError(f"PhaseTimer.collect() inside the phase {'/'.join(self._stack)!r}")
        seconds = self.seconds()
        self._seconds = {}
        self._started = self._now()
        return seconds

    def _tell_watchdog(self) -> None:
        if self._watchdog is not None:
            self._watchdog.note("/".join(self._stack))

    def _now(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return time.perf_counter()


def top_level(seconds: dict[str, float]) -> dict[str, float]:
    """Phases without a parent, in order, and ``other``: what is left of the total (0 when there is no total)."""
    phases = {name: value for name, value in seconds.items() if "/" not in name and name != TOTAL}
    if TOTAL in seconds:
        phases["other"] = max(0.0, seconds[TOTAL] - sum(phases.values()))
    return phases

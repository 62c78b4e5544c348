"""How long something has been silent, and what state the kernel says a process is in."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from pathlib import Path

#: Letters of /proc/<pid>/stat that say why a process does nothing.
STATES = {
    "D": "waits for a device or a file system, uninterruptible",
    "R": "runs",
    "S": "sleeps",
    "T": "stopped",
    "t": "stopped by a debugger",
    "X": "dead",
    "Z": "ended",
}


class SilenceClock:
    """Counts seconds for which a value did not change, in the time in which the observer itself ran.

    The observer looks at short intervals. When the time between two looks is longer than ``longest_gap_s``, the observer was stopped or the
    machine was suspended, and so was what it observes, probably: no more than ``longest_gap_s`` of it counts.
    """

    def __init__(self, longest_gap_s: float, now: Callable[[], float] = time.monotonic) -> None:
        """Start with no silence.

        Args:
            longest_gap_s: Longest time between two looks that counts as observed, in seconds.
            now: Clock, in seconds.
        """
        self.longest_gap_s = longest_gap_s
        self._now = now
        self._last_look = now()
        self._value: Hashable = None
        self.silent_s = 0.0

    def look(self, value: Hashable) -> float:
        """Return the observed seconds since the value changed.

        Args:
            value: What changes while the observed one lives: a counter.
        """
        now = self._now()
        if value == self._value:
            self.silent_s += min(now - self._last_look, self.longest_gap_s)
        else:
            self._value, self.silent_s = value, 0.0
        self._last_look = now
        return self.silent_s

    def reset(self) -> None:
        """Forget the silence: from now on it counts from zero."""
        self._last_look, self.silent_s = self._now(), 0.0


def process_state(pid: int) -> str | None:
    """Return the state letter of a process and its meaning, ``T (stopped)``; None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    letter = text.rpartition(")")[2].split()[0]  # the name before it may hold spaces and parentheses
    return f"{letter} ({STATES.get(letter, 'unknown')})"


def num_waits(pid: int) -> int | None:
    """Return how often a process has given its core up by itself; it grows while a process polls. None when it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    counts = [line.split()[1] for line in text.splitlines() if line.startswith("voluntary_ctxt_switches")]
    return int(counts[0]) if counts else None  # a zombie has none

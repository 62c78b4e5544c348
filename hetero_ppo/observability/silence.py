"""Measure how long something has been silent, and read the state of a process from the kernel."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from pathlib import Path

#: State letters of /proc/<pid>/stat, and why a process in that state may do nothing.
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
    """Clock of the seconds in which a value did not change while the observer itself was running.

    The observer looks at short intervals. If the time between two looks exceeds ``longest_gap_s``, the observer was stopped or the machine was
    suspended, and probably the observed process as well. Then only ``longest_gap_s`` of that time counts.
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
            value: Counter that changes while the observed process lives.
        """
        now = self._now()
        if value == self._value:
            self.silent_s += min(now - self._last_look, self.longest_gap_s)
        else:
            self._value, self.silent_s = value, 0.0
        self._last_look = now
        return self.silent_s

    def reset(self) -> None:
        """Reset the silence; it counts from zero again."""
        self._last_look, self.silent_s = self._now(), 0.0


def process_state(pid: int) -> str | None:
    """Return the state letter of a process and its meaning, ``T (stopped)``; None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    letter = text.rpartition(")")[2].split()[0]  # the name before it may contain spaces and parentheses
    return f"{letter} ({STATES.get(letter, 'unknown')})"


def num_waits(pid: int) -> int | None:
    """Return how often a process has given up its core voluntarily; None if it is gone. The number grows while a process polls."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    counts = [line.split()[1] for line in text.splitlines() if line.startswith("voluntary_ctxt_switches")]
    return int(counts[0]) if counts else None  # a zombie has none

"""Ends a process whose phase does not get on, and leaves the stacks of all its threads.

A thread of Python's does it, unless another thread never gives the GIL back (a regex, a loop in C). Then a thread of
faulthandler's, which needs no GIL, writes the stacks to stderr and ends the process with status 1.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from hetero_ppo.errors import EXIT_STUCK

#: From the dump to the end of the process: peers that wait for this one get to dump theirs before torchrun ends them.
PEERS_DUMP_S = 3.0
#: Seconds that the watchdog's thread gets to end the process before faulthandler's does, which needs no GIL.
GIL_S = 10.0
#: sys.stderr may be somebody's replacement without a descriptor.
STDERR = 2


class Watchdog:
    """Counts the time since a phase began, or since one inside it began or ended. Outside of phases nothing counts."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        timeout_s: float | None,
        *,
        peers_dump_s: float = PEERS_DUMP_S,
        gil_s: float = GIL_S,
        on_phase: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            folder: where ``stacks_rank<r>.txt`` is written.
            rank: of this process.
            timeout_s: seconds without a change of phase after which the process ends; None: never.
            peers_dump_s: seconds from the dump to the end.
            gil_s: Seconds beyond all that, after which faulthandler ends the process.
            on_phase: Called with the name of every phase that begins, or goes on; empty: outside of all.
        """
        self.path = folder / f"stacks_rank{rank}.txt"
        self.rank = rank
        self.timeout_s = timeout_s
        self.peers_dump_s = peers_dump_s
        self.gil_s = gil_s
        self._on_phase = on_phase
        self.failed_in = ""  # the innermost phase that an error has ended; empty: none
        self._phase = ""
        self._since = time.monotonic()
        self._is_over = False
        self._changed = threading.Condition()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if self.timeout_s is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def note(self, phase: str) -> None:
        """The process is in this phase from now on; an empty name is outside of all."""
        with self._changed:
            self._phase, self._since = phase, time.monotonic()
            self._arm()
        if self._on_phase is not None:
            self._on_phase(phase)

    def progress(self) -> None:
        """The phase gets on, though none begins or ends in it."""
        self.note(self._phase)

    def _arm(self) -> None:
        """Let faulthandler's thread count from now on, too."""
        if self.timeout_s is None or self._is_over:
            return
        if self._phase:
            limit_s = self.timeout_s + self.peers_dump_s + self.gil_s
            faulthandler.dump_traceback_later(limit_s, exit=True, file=STDERR)
        else:
            faulthandler.cancel_dump_traceback_later()

    def note_failure(self, phase: str) -> None:
        """An error ends this phase, and then those around it."""
        self.failed_in = self.failed_in or phase

    def _watch(self) -> None:
        assert self.timeout_s is not None
        with self._changed:
            while not self._is_over:
                left = self._since + self.timeout_s - time.monotonic() if self._phase else self.timeout_s
                if left <= 0:
                    self._end()
                self._changed.wait(max(left, 0.01))

    def _end(self) -> None:
        assert self.timeout_s is not None  # the thread that calls this runs with a limit alone
        with self.path.open("w") as file:
            file.write(f"rank {self.rank}, phase {self._phase}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        print(
            f"error: rank {self.rank} is stuck in phase {self._phase}: nothing began or ended in it for {self.timeout_s / 60:g} min "
            f"(run.phase_timeout_minutes). Stacks of its threads: {self.path}",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(self.peers_dump_s)
        os._exit(EXIT_STUCK)  # the main thread is what does not get on

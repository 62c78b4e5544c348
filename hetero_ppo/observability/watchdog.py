"""End a process whose phase makes no progress, and write the stacks of all its threads.

A Python thread does it, unless another thread never gives up the GIL (a regular expression, a loop in C). In that case a thread of
faulthandler, which needs no GIL, writes the stacks to stderr and ends the process with status 1.
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

#: Seconds from the dump to the end of the process, so that peers that wait for it can dump their stacks before torchrun ends them.
PEERS_DUMP_S = 3.0
#: Seconds that the watchdog's thread has to end the process before faulthandler's thread does.
GIL_S = 10.0
#: Descriptor of stderr; sys.stderr may be a replacement that has none.
STDERR = 2


class Watchdog:
    """Watchdog that counts the time since a phase, or one inside it, last began or ended. Outside of phases nothing counts."""

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
        """Take the settings; ``with`` starts the thread.

        Args:
            folder: Folder for ``stacks_rank<r>.txt``.
            rank: Rank of this process.
            timeout_s: Seconds without a change of phase after which the process ends; None: never.
            peers_dump_s: Seconds from the dump to the end.
            gil_s: Seconds after all that until faulthandler ends the process.
            on_phase: Function that is called with the name of every phase that begins or continues; "" outside of all phases.
        """
        self.path = folder / f"stacks_rank{rank}.txt"
        self.rank = rank
        self.timeout_s = timeout_s
        self.peers_dump_s = peers_dump_s
        self.gil_s = gil_s
        self._on_phase = on_phase
        self.failed_in = ""  # innermost phase that an error has ended; "": none
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
        """Note that the process is in this phase now; an empty name means outside of all phases."""
        with self._changed:
            self._phase, self._since = phase, time.monotonic()
            self._arm()
        if self._on_phase is not None:
            self._on_phase(phase)

    def progress(self) -> None:
        """Note progress in a phase in which no other phase begins or ends."""
        self.note(self._phase)

    def _arm(self) -> None:
        """Start faulthandler's timer again, too."""
        if self.timeout_s is None or self._is_over:
            return
        if self._phase:
            limit_s = self.timeout_s + self.peers_dump_s + self.gil_s
            faulthandler.dump_traceback_later(limit_s, exit=True, file=STDERR)
        else:
            faulthandler.cancel_dump_traceback_later()

    def note_failure(self, phase: str) -> None:
        """Note the innermost phase that an error ends; the phases around it end after it."""
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
        assert self.timeout_s is not None  # the thread that calls this only runs with a limit
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
        os._exit(EXIT_STUCK)  # sys.exit would not help: the main thread is stuck

"""Heartbeats: every rank increments a counter in memory shared with its launcher, which ends the run when a counter stops.

A thread of the rank counts, not the main thread, so a rank that waits in a collective or in a long kernel counts as alive. The thread stops
if the process is stopped (SIGSTOP), hangs in the kernel, or its main thread holds the GIL in C code forever. A phase that makes no progress
while threads run is found by the watchdog (observability/watchdog.py).

The memory is anonymous (memfd). The environment of the ranks has its path below /proc, and only processes of the same user can open it.
Each launcher monitors the ranks of its own node.
"""

from __future__ import annotations

import faulthandler
import math
import mmap
import os
import signal
import socket
import struct
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from hetero_ppo.errors import EXIT_STUCK
from hetero_ppo.observability.silence import SilenceClock, process_state

#: Environment variable of the ranks that holds the path of the memory.
VARIABLE = "HETERO_PPO_HEARTBEATS"
#: Seconds between two beats, and between two checks of the launcher.
BEAT_S = 1.0
#: Most seconds between two checks that count as silence. A longer time means that the launcher was stopped, too.
LONGEST_GAP_S = 2 * BEAT_S
#: Signal that asks a rank for the stacks of its threads. The handler is C code and needs no GIL.
STACKS_SIGNAL = signal.SIGUSR2
STACKS_WAIT_S = 2.0
#: When a run ends because of one silent rank, ranks that are silent for this long are killed too: torchrun would wait for them.
ALSO_SILENT_S = 3 * BEAT_S
#: Most seconds from the kill of a silent rank to the end of the launcher, because a process that hangs in the kernel does not die.
END_WITHIN_S = 45.0
MAX_LOCAL_RANKS = 256
SLOT_BYTES, PHASE_BYTES = 256, 160
#: Counter, timeout in seconds (0: not monitored), process id, rank. The phase follows.
HEADER = struct.Struct("<QdII")


class Heartbeat:
    """Heartbeat of this rank, while the ``with`` block runs. Without a launcher that monitors it, nothing happens."""

    def __init__(self, timeout_s: float | None) -> None:
        """Find the launcher's memory.

        Args:
            timeout_s: Seconds without a beat after which the launcher ends the run; None: never.
        """
        self.timeout_s = timeout_s
        path = os.environ.get(VARIABLE, "")
        # A launcher further up in the process tree, which did not start this process directly, is not ours.
        is_ours = path.startswith(f"/proc/{os.getppid()}/fd/")
        self._path = path if is_ours and timeout_s is not None else None
        self._memory: mmap.mmap | None = None
        self._offset = SLOT_BYTES * int(os.environ.get("LOCAL_RANK", "0"))
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    @property
    def is_monitored(self) -> bool:
        """True when a launcher monitors the beats."""
        return self._path is not None

    def __enter__(self) -> Self:
        if self._path is None:
            return self
        faulthandler.register(STACKS_SIGNAL, file=sys.__stderr__ or sys.stderr, all_threads=True)
        with open(self._path, "r+b", buffering=0) as file:
            self._memory = mmap.mmap(file.fileno(), MAX_LOCAL_RANKS * SLOT_BYTES)
        self.note("start")
        self._write(1)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._memory is None:
            return
        self._is_over.set()
        self._thread.join()
        self._memory[self._offset : self._offset + HEADER.size] = bytes(HEADER.size)
        self._memory.close()
        self._memory = None
        faulthandler.unregister(STACKS_SIGNAL)

    def note(self, phase: str) -> None:
        """Name the phase that the rank is in, for the launcher's message."""
        if self._memory is not None:
            start = self._offset + HEADER.size
            self._memory[start : start + PHASE_BYTES] = phase.encode()[:PHASE_BYTES].ljust(PHASE_BYTES, b"\0")

    def _beat(self) -> None:
        count = 1
        while not self._is_over.wait(BEAT_S):
            count += 1
            self._write(count)

    def _write(self, count: int) -> None:
        assert self._memory is not None and self.timeout_s is not None
        HEADER.pack_into(self._memory, self._offset, count, self.timeout_s, os.getpid(), int(os.environ["RANK"]))


class HeartbeatMonitor:
    """The launcher's side: monitors the ranks while the ``with`` block runs, and ends those that are silent for too long."""

    def __init__(self) -> None:
        """Create the memory and put its path into the environment, which the ranks inherit."""
        self._file: BinaryIO = os.fdopen(os.memfd_create("hetero_ppo_heartbeats"), "r+b", buffering=0)
        self._file.truncate(MAX_LOCAL_RANKS * SLOT_BYTES)
        self._memory = mmap.mmap(self._file.fileno(), MAX_LOCAL_RANKS * SLOT_BYTES)
        self._clocks: dict[int, tuple[int, SilenceClock]] = {}  # local rank -> (process id, clock)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._monitor, name="heartbeats", daemon=True)
        self.has_ended_a_rank = False

    def __enter__(self) -> Self:
        os.environ[VARIABLE] = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()
        del os.environ[VARIABLE]
        self._memory.close()
        self._file.close()

    def _monitor(self) -> None:
        while not self._is_over.wait(BEAT_S):
            silent = self.find_silent()
            if silent:
                self.has_ended_a_rank = True
                self._end(silent)
                return

    def find_silent(self, enough_s: float = math.inf) -> dict[int, str]:
        """Return process id -> message of every rank that is silent for too long.

        Args:
            enough_s: Seconds of silence that are too long, if the rank's own limit is longer.
        """
        silent = {}
        for local_rank in range(MAX_LOCAL_RANKS):
            offset = SLOT_BYTES * local_rank
            count, timeout_s, pid, rank = HEADER.unpack_from(self._memory, offset)
            if timeout_s == 0.0:
                self._clocks.pop(local_rank, None)
                continue
            known = self._clocks.get(local_rank)
            if known is None or known[0] != pid:
                known = self._clocks[local_rank] = (pid, SilenceClock(LONGEST_GAP_S))
            silent_s = known[1].look(count)
            state = process_state(pid)
            if state is None or state[0] in "XZ":  # torchrun notices that it has ended
                continue
            if state[0] == "t":  # a debugger has stopped it
                known[1].reset()
            elif silent_s >= min(timeout_s, enough_s):
                start = offset + HEADER.size
                phase = self._memory[start : start + PHASE_BYTES].rstrip(b"\0").decode(errors="replace")
                silent[pid] = _describe(rank, pid, phase, silent_s, state)
        return silent

    def _end(self, silent: dict[int, str]) -> None:
        """Kill the silent ranks; torchrun then ends the others. If it does not, end this process as well."""
        _signal(list(silent), STACKS_SIGNAL)  # has no effect on a stopped rank
        self._is_over.wait(STACKS_WAIT_S)
        silent |= self.find_silent(ALSO_SILENT_S)
        for text in silent.values():
            print(f"error: {text}", file=sys.stderr, flush=True)
        _signal(list(silent), signal.SIGKILL)
        if not self._is_over.wait(END_WITHIN_S):
            me = os.getpid()
            _signal([int(pid) for pid in Path(f"/proc/{me}/task/{me}/children").read_text().split()], signal.SIGKILL)
            os._exit(EXIT_STUCK)  # torchrun waits for a process that hangs in the kernel


def _describe(rank: int, pid: int, phase: str, silent_s: float, state: str) -> str:
    hint = {
        "T": "it was stopped; SIGCONT would have let it continue",
        "D": "it waits for a disk, a network file system or a driver: see the kernel's log",
    }.get(state[0], "a call holds the GIL and does not return: its stacks are above, if it could still write them")
    where = f"in phase {phase}" if phase else "between phases"
    return (
        f"rank {rank} on {socket.gethostname()} (process {pid}) has given no sign of life for {silent_s:.0f} s "
        f"(run.heartbeat_timeout_s), {where}; its state is {state}: the run ends. Most likely {hint}"
    )


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue  # it has ended meanwhile

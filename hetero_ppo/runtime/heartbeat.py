"""Heartbeats: every rank counts in memory that it shares with its launcher, and the launcher ends a run whose rank stopped counting.

A thread of the rank counts, not the main thread: a rank that waits in a collective or in a long kernel lives. The thread stops with a process
that is stopped (SIGSTOP), that hangs in the kernel, or whose main thread holds the GIL in C code for good. A phase that does not get on
while threads run is the watchdog's to see (observability/watchdog.py).

The memory is anonymous (memfd). Its path below /proc is in the environment of the ranks, and only processes of the same user open it.
Each launcher judges the ranks of its own node.
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

#: Environment variable of the ranks: path of the memory.
VARIABLE = "HETERO_PPO_HEARTBEATS"
#: Seconds between two beats, and between two looks of the launcher.
BEAT_S = 1.0
#: Of the time between two looks no more counts as silence: a longer one means that the launcher, too, was stopped.
LONGEST_GAP_S = 2 * BEAT_S
#: Asks a rank for the stacks of its threads. The handler is C code and needs no GIL.
STACKS_SIGNAL = signal.SIGUSR2
STACKS_WAIT_S = 2.0
#: When the run ends for one silent rank, others that are silent for so long are ended with it: torchrun would wait for them.
ALSO_SILENT_S = 3 * BEAT_S
#: From the end of a silent rank to the end of the launcher, whatever torchrun waits for: a process in the kernel does not die.
END_WITHIN_S = 45.0
MAX_LOCAL_RANKS = 256
SLOT_BYTES, PHASE_BYTES = 256, 160
#: counter, timeout in seconds (0: not judged), process id, rank; then the phase.
HEADER = struct.Struct("<QdII")


class Heartbeat:
    """The heartbeat of this rank while the block runs. Without a launcher that judges it, nothing happens."""

    def __init__(self, timeout_s: float | None) -> None:
        """Find the launcher's memory.

        Args:
            timeout_s: Seconds without a beat after which the launcher ends the run; None: never.
        """
        self.timeout_s = timeout_s
        path = os.environ.get(VARIABLE, "")
        # A launcher further up, which started what started this process, is not this one's.
        is_ours = path.startswith(f"/proc/{os.getppid()}/fd/")
        self._path = path if is_ours and timeout_s is not None else None
        self._memory: mmap.mmap | None = None
        self._offset = SLOT_BYTES * int(os.environ.get("LOCAL_RANK", "0"))
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    @property
    def is_judged(self) -> bool:
        """Whether a launcher looks at the beats."""
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


class HeartbeatJudge:
    """The launcher's side: makes the memory, looks at it while the block runs, and ends ranks that are silent for too long."""

    def __init__(self) -> None:
        """Make the memory and name it in the environment, which the ranks inherit."""
        self._file: BinaryIO = os.fdopen(os.memfd_create("hetero_ppo_heartbeats"), "r+b", buffering=0)
        self._file.truncate(MAX_LOCAL_RANKS * SLOT_BYTES)
        self._memory = mmap.mmap(self._file.fileno(), MAX_LOCAL_RANKS * SLOT_BYTES)
        self._clocks: dict[int, tuple[int, SilenceClock]] = {}  # local rank -> (process id, clock)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._judge, name="heartbeats", daemon=True)
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

    def _judge(self) -> None:
        while not self._is_over.wait(BEAT_S):
            silent = self.look()
            if silent:
                self.has_ended_a_rank = True
                self._end(silent)
                return

    def look(self, enough_s: float = math.inf) -> dict[int, str]:
        """Return the process id of every rank that is silent for too long, with one line that says what is known of it.

        Args:
            enough_s: Seconds that are too long, where the rank's own deadline is longer.
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
            if state is None or state[0] in "XZ":  # torchrun sees its end
                continue
            if state[0] == "t":  # somebody debugs it
                known[1].reset()
            elif silent_s >= min(timeout_s, enough_s):
                start = offset + HEADER.size
                phase = self._memory[start : start + PHASE_BYTES].rstrip(b"\0").decode(errors="replace")
                silent[pid] = _describe(rank, pid, phase, silent_s, state)
        return silent

    def _end(self, silent: dict[int, str]) -> None:
        """Kill the silent ranks, upon which torchrun ends the others; if it does not, end this process all the same."""
        _signal(list(silent), STACKS_SIGNAL)  # of no effect where one is stopped
        self._is_over.wait(STACKS_WAIT_S)
        silent |= self.look(ALSO_SILENT_S)
        for text in silent.values():
            print(f"error: {text}", file=sys.stderr, flush=True)
        _signal(list(silent), signal.SIGKILL)
        if not self._is_over.wait(END_WITHIN_S):
            me = os.getpid()
            _signal([int(pid) for pid in Path(f"/proc/{me}/task/{me}/children").read_text().split()], signal.SIGKILL)
            os._exit(EXIT_STUCK)  # torchrun waits for a process that the kernel does not let go


def _describe(rank: int, pid: int, phase: str, silent_s: float, state: str) -> str:
    hint = {
        "T": "somebody or something has stopped it; SIGCONT would have let it go on",
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

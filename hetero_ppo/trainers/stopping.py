"""Requests to stop a run: by SIGTERM, by SIGUSR1, which batch systems send some minutes before they kill, or by SIGHUP, when the
terminal is closed or the connection lost. A SIGHUP that is ignored when the run starts (nohup) stays ignored.

The ranks finish the step, save a checkpoint, and end with exit status 75. A rank that gets no signal learns of the request at the end of
the step, where all ranks agree. Two signals end the process at once: a second SIGTERM, and the SIGTERM by which torchrun ends a rank when
another one has died.

A thread reads the signals. Python runs handlers between two instructions of the main thread, which may be for minutes in a collective, in a
forward or in a wait for the generator.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import torch
import torch.distributed as dist

from hetero_ppo.errors import EXIT_NOT_STOPPED_IN_TIME

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
#: Seconds in which several signals are one request: a batch system may signal every process while the launcher passes the signal on.
SAME_REQUEST_S = 2.0
#: Seconds between two checks that the launcher still runs. A launcher that is killed cannot end its ranks.
LOOK_S = 1.0
#: Option of prctl(2), from prctl.h.
PR_SET_PDEATHSIG = 1


class StopRequests:
    """Listens to the signals while the block runs. It is opened in the main thread of the process.

    Args:
        within_s: Seconds from the request after which the process ends, with a checkpoint or without.
    """

    def __init__(self, within_s: float) -> None:
        self.within_s = within_s
        self._requested_at: float | None = None  # time.monotonic()
        self._is_honoured = False
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __enter__(self) -> Self:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        heard = [
            number
            for number in SIGNALS
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
        ]
        self._previous = {number: signal.signal(number, _leave_it_to_the_thread) for number in heard}
        self._previous_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="stop-requests", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._write_end)  # ends the thread
        self._thread.join()
        os.close(self._read_end)
        if self._launcher is not None:
            _end_with_parent()
            self._look_at_launcher()

    @property
    def is_requested(self) -> bool:
        """True when this process was asked to stop."""
        return self._requested_at is not None

    def agreed(self, world: dist.ProcessGroup) -> bool:
        """Return whether any rank of the world was asked to stop. Collective, once a step: all ranks stop after the same one."""
        num_requests = torch.tensor([int(self.is_requested)])
        dist.all_reduce(num_requests, op=dist.ReduceOp.MAX, group=world)
        return bool(num_requests)

    def honoured(self) -> None:
        """Note that the checkpoint is made. Signals and the limit of seconds have no effect after that."""
        self._is_honoured = True

    def _listen(self) -> None:
        while True:
            left = self._seconds_left()
            ready, _, _ = select.select([self._read_end], [], [], LOOK_S if left is None else min(left, LOOK_S))
            if not ready:
                self._look_at_launcher()
                if self._seconds_left() == 0.0:
                    self._end(
                        EXIT_NOT_STOPPED_IN_TIME,
                        f"not stopped within run.stop_within_s={self.within_s:g}: no checkpoint",
                    )
                continue
            numbers = os.read(self._read_end, 64)
            if not numbers:
                return
            for number in numbers:
                if number in SIGNALS and not self._is_honoured:
                    self._take(signal.Signals(number))

    def _look_at_launcher(self) -> None:
        if self._launcher is not None and os.getppid() != self._launcher:
            self._end(
                1, "the launcher has ended without its ranks: this run ends, and goes on from its last checkpoint"
            )

    def _seconds_left(self) -> float | None:
        if self._is_honoured or self._requested_at is None:
            return None
        return max(0.0, self._requested_at + self.within_s - time.monotonic())

    def _take(self, number: signal.Signals) -> None:
        if number is signal.SIGTERM and _a_rank_of_the_node_has_ended():
            self._end(128 + number, None)
        if self._requested_at is None:
            self._requested_at = time.monotonic()
            if _is_first_rank():
                text = f"{number.name}: the run stops with a checkpoint after this step, or without one in {self.within_s:g} s"
                print(text, file=sys.stderr, flush=True)
        elif number is signal.SIGTERM and time.monotonic() > self._requested_at + SAME_REQUEST_S:
            self._end(128 + number, "stopped at once by a second SIGTERM: no checkpoint")

    def _end(self, status: int, text: str | None) -> None:
        if text is not None and _is_first_rank():
            print(f"error: {text}", file=sys.stderr, flush=True)
        # The main thread may never return. The processes that this one started end with it (rollout/servers/guardian.py).
        os._exit(status)


def _end_with_parent() -> None:
    """Let the kernel end this process when its launcher dies: while it ends, it may wait for the launcher's store."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _leave_it_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Leave the signal to the thread. Without a handler Python would not write it to the pipe."""


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _a_rank_of_the_node_has_ended() -> bool:
    """Return whether torchrun's agent has fewer children than the node has ranks. It then ends the others by SIGTERM."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    agent = os.getppid()
    children = Path(f"/proc/{agent}/task/{agent}/children")
    try:
        return len(children.read_text().split()) < int(os.environ["LOCAL_WORLD_SIZE"])
    except FileNotFoundError:  # the agent has ended, or the kernel does not list children
        return not Path(f"/proc/{agent}").exists()

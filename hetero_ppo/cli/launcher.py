"""Run torchrun with errors that fit on a line: ``python -m hetero_ppo.cli.launcher <torchrun's arguments>``.

Parser and agent are torchrun's own, and plain ``torchrun`` works as well. Two things differ. Launchers and ranks rendezvous where no
other process can join (runtime/rendezvous.py). And a failed run ends with one line, which names the rank and how it ended; the exit status is
the rank's (128 + n for signal n). torchrun prints a traceback of itself and a banner, below which the error of the rank is hard to find, and
always exits with 1.

SIGTERM, SIGUSR1 and SIGHUP ask for a stop with a checkpoint. torchrun would end the ranks within 30 s. The launcher passes these
signals on as SIGUSR1, and the ranks end by themselves (trainers/stopping.py). A second SIGTERM, and SIGINT, end them at once. A SIGHUP that
is ignored when the launcher starts (nohup) stays ignored.

A rank that is stopped or frozen ends the run (runtime/heartbeat.py).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError
from torch.distributed.run import parse_args, run

from hetero_ppo.errors import EXIT_NOT_STOPPED_IN_TIME, EXIT_STOPPED, EXIT_STUCK
from hetero_ppo.runtime.heartbeat import HeartbeatMonitor
from hetero_ppo.runtime.rendezvous import RUN_KEY, STORE_FILE, use_static_rendezvous
from hetero_ppo.runtime.terminal import survive_hangup

#: Loggers of torchrun, and how their records begin that the line of this module replaces: a rank failed, the others are
#: being stopped, a signal arrived.
REPLACED_RECORDS = {
    "torch.distributed.elastic.multiprocessing.api": ("failed (exitcode", "Sending process"),
    "torch.distributed.elastic.agent.server.api": ("Received %s death signal",),
}


#: From torchrun's SIGTERM to its SIGKILL, which ranks get when another one has failed; less a second, for timestamps are whole seconds.
TORCHRUN_GRACE_S = 29


class _Drop(logging.Filter):
    """Filter that drops records with given beginnings."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.beginnings)


class _StopRequest:
    """Signal handler that passes requests to stop on to the ranks of this node."""

    #: Within this time a second signal is the first one once more: a batch system may send it to a process and to its group.
    SAME_REQUEST_S = 2.0

    def __init__(self) -> None:
        self.received_at: float | None = None  # time.monotonic()

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGTERM, SIGUSR1 and SIGHUP.

        Raises:
            SignalException: Nothing runs yet, or it is a second SIGTERM: torchrun ends the ranks.
        """
        name = signal.Signals(number)
        ranks = self._ranks()
        is_second = self.received_at is not None and time.monotonic() > self.received_at + self.SAME_REQUEST_S
        if not ranks or (is_second and name is signal.SIGTERM):
            raise SignalException(f"got {name.name}", sigval=name)
        if self.received_at is None:
            self.received_at = time.monotonic()
            for pid in ranks:
                try:
                    os.kill(pid, signal.SIGUSR1)
                except ProcessLookupError:
                    continue  # it has ended meanwhile, which the agent will see

    @staticmethod
    def _ranks() -> list[int]:
        """Return the agent's children, which it starts from the main thread."""
        me = os.getpid()
        return [int(pid) for pid in Path(f"/proc/{me}/task/{me}/children").read_text().split()]


def describe_failure(rank: int, failure: ProcessFailure) -> tuple[str, int]:
    """Return (one line, exit status) for a failed rank."""
    if failure.exitcode < 0:
        return f"rank {rank} was ended by {failure.signal_name()} (signal {-failure.exitcode})", 128 - failure.exitcode
    return f"rank {rank} ended with exit status {failure.exitcode}; see the error above", failure.exitcode


def first_cause(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """Return the rank that failed by itself, and its failure.

    A rank whose peer was killed ends within milliseconds, and torchrun finds both at once, so it cannot tell which was first. A signal
    that ended a rank is a cause of its own, unless torchrun sent it: SIGTERM, and SIGKILL after TORCHRUN_GRACE_S. Among such ranks, and
    where there is none, the earliest is the first cause.
    """
    earliest = min(failure.timestamp for failure in failures.values())

    def order(item: tuple[int, ProcessFailure]) -> tuple[bool, int]:
        failure = item[1]
        is_torchruns = failure.exitcode == -signal.SIGTERM or failure.timestamp >= earliest + TORCHRUN_GRACE_S
        return failure.exitcode >= 0 or is_torchruns, failure.timestamp

    return min(failures.items(), key=order)


def main(arguments: list[str] | None = None) -> int:
    """Run torchrun and return the exit status.

    Args:
        arguments: Arguments of torchrun; None: those of the process.
    """
    for name, beginnings in REPLACED_RECORDS.items():
        logging.getLogger(name).addFilter(_Drop(beginnings))
    request = _StopRequest()
    args = parse_args(arguments)
    try:
        use_static_rendezvous(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    ours = [signal.SIGTERM.name, signal.SIGUSR1.name, signal.SIGHUP.name]
    args.signals_to_handle = ",".join(name for name in args.signals_to_handle.split(",") if name.strip() not in ours)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        ours.remove(signal.SIGHUP.name)
    previous = {name: signal.signal(signal.Signals[name], request.receive) for name in ours}
    # The rendezvous sets them for the ranks.
    environment = {name: os.environ.get(name) for name in (STORE_FILE, RUN_KEY)}
    monitor = HeartbeatMonitor()
    try:
        with monitor:
            run(args)
    except ChildFailedError as error:
        if monitor.has_ended_a_rank:
            return EXIT_STUCK  # the reason is logged
        rank, failure = first_cause(error.failures)
        if request.received_at is not None and failure.exitcode == -signal.SIGUSR1:
            text, status = "the run was stopped before its first step: there is nothing to save", EXIT_STOPPED
        elif failure.exitcode in (EXIT_STOPPED, EXIT_NOT_STOPPED_IN_TIME):
            return failure.exitcode  # the ranks have printed it
        else:
            text, status = describe_failure(rank, failure)
    except RendezvousConnectionError as error:
        text, status = str(error), 1
    except SignalException as error:
        text, status = f"the run was stopped by {error.sigval.name}", 128 + error.sigval
    else:
        return 0
    finally:
        for name, handler in previous.items():
            signal.signal(signal.Signals[name], handler)
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
    print(f"error: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    # Until the ranks are started torchrun has no handlers of its own: nothing runs yet that would have to be stopped.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    survive_hangup()
    sys.exit(main())

"""``torchrun`` with errors that fit on a line: ``python -m hetero_ppo.cli.launcher <torchrun's arguments>``.

The parser and the agent are torchrun's own, so every option of it works, and so does plain ``torchrun``. What differs is the
end of a run that fails: torchrun prints a traceback of itself and a banner, below which the error of the rank is hard to
find, and always exits with 1. Here one line says which rank ended and how, and the exit status is the rank's
(128 + n for signal n).
"""

from __future__ import annotations

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

#: Loggers of torchrun, and how their records begin that the line of this module replaces: a rank failed, the others are
#: being stopped, a signal arrived.
REPLACED_RECORDS = {
    "torch.distributed.elastic.multiprocessing.api": ("failed (exitcode", "Sending process"),
    "torch.distributed.elastic.agent.server.api": ("Received %s death signal",),
}


class _Drop(logging.Filter):
    """Drops records by how they begin."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.beginnings)


def describe_failure(rank: int, failure: ProcessFailure) -> tuple[str, int]:
    """(one line, exit status) for a rank that failed."""
    if failure.exitcode < 0:
        return f"rank {rank} was ended by {failure.signal_name()} (signal {-failure.exitcode})", 128 - failure.exitcode
    return f"rank {rank} ended with exit status {failure.exitcode}; see the error above", failure.exitcode


def main(arguments: list[str] | None = None) -> int:
    """Run torchrun; returns the exit status.

    Args:
        arguments: torchrun's; None: those of the process.
    """
    for name, beginnings in REPLACED_RECORDS.items():
        logging.getLogger(name).addFilter(_Drop(beginnings))
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        text, status = describe_failure(*error.get_first_failure())
    except SignalException as error:
        text, status = f"the run was stopped by {error.sigval.name}", 128 + error.sigval
    else:
        return 0
    print(f"error: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    # Until the ranks are started torchrun has no handlers of its own: nothing runs yet that would have to be stopped.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main())

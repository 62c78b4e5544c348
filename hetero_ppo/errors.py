"""Errors that are neither a bug nor a mistake in the user's input, and the exit statuses of a run."""

from __future__ import annotations

#: Exit status of a run that stopped on request and can be resumed without losing a step; sysexits.h calls it EX_TEMPFAIL.
EXIT_STOPPED = 75
#: Exit status of a run that was asked to stop and reached no checkpoint in time. It resumes from the previous one.
EXIT_NOT_STOPPED_IN_TIME = 76
#: Exit status of a rank whose phase made no progress and that has written the stacks of its threads. Also the exit status of a launcher
#: whose rank gave no sign of life.
EXIT_STUCK = 77


class RunError(RuntimeError):
    """Something that the run depends on failed: for example a server died, does not answer, or does not hold the weights.

    The message tells what failed, where its log is, and which option affects it. The command line prints it without a traceback.
    """


class StoppedOnRequest(Exception):
    """A signal asked the run to stop, and its work is saved. The message tells how to resume."""

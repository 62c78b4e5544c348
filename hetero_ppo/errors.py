"""Errors that are no fault of the code and no fault of the user's input."""

from __future__ import annotations

#: Exit status of a run that stopped on request and can be resumed without a lost step; sysexits.h calls it EX_TEMPFAIL.
EXIT_STOPPED = 75
#: Exit status of a run that was asked to stop and did not get to a checkpoint in time: it resumes from the one before.
EXIT_NOT_STOPPED_IN_TIME = 76
#: Exit status of a rank whose phase did not get on; it has written the stacks of its threads. And of the launcher of a rank that gave no
#: sign of life.
EXIT_STUCK = 77


class RunError(RuntimeError):
    """Something that the run depends on failed: a server died, or does not answer, or does not hold the weights.

    The message says what, where its log is, and which option bears on it; the command line prints it without a traceback.
    """


class StoppedOnRequest(Exception):
    """A signal asked the run to stop, and what it had done is saved. The message says how to go on."""

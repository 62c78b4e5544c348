"""Errors that are no fault of the code and no fault of the user's input."""

from __future__ import annotations


class RunError(RuntimeError):
    """Something that the run depends on failed: a server died, or does not answer, or does not hold the weights.

    The message says what, where its log is, and which option bears on it; the command line prints it without a traceback.
    """

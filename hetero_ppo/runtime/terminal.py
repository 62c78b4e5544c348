"""Output streams that survive their terminal: a closed window or a lost connection must not end a run with an error of ``print``."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any, TextIO


class TerminalStream:
    """A text stream on a terminal. Text that is written after the terminal has gone is dropped."""

    def __init__(self, stream: TextIO) -> None:
        """Wrap a stream.

        Args:
            stream: ``sys.stdout`` or ``sys.stderr``, on a terminal.
        """
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text; it is dropped if the terminal has gone."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        """Flush the stream; does nothing if the terminal has gone."""
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self, error: OSError) -> None:
        if error.errno != errno.EIO:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # C code and children write there too
        os.close(nowhere)
        self._stream.flush()  # drops what the failed call has left in the buffer


def survive_hangup() -> None:
    """Wrap stdout and stderr of this process if they are a terminal."""
    if sys.stdout.isatty():
        sys.stdout = TerminalStream(sys.stdout)
    if sys.stderr.isatty():
        sys.stderr = TerminalStream(sys.stderr)

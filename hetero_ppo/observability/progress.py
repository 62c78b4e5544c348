"""Progress of long work: a bar on a terminal, or a line every ten seconds in a log file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Generic, TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")

#: Seconds between two lines if the output is not a terminal.
LINE_INTERVAL_S = 10.0


def is_writer_rank() -> bool:
    """Return whether this process is rank 0 by torchrun's ``RANK``. A process without torchrun is rank 0."""
    return os.environ.get("RANK", "0") == "0"


class PlainProgress(Generic[T]):
    """Progress without control characters: a line at most every ``interval_s`` seconds, and one at the end. It has tqdm's interface.

    With ``file`` None nothing is printed. Loops shorter than the interval print nothing at all.
    """

    def __init__(
        self,
        iterable: Iterable[T] | None,
        total: int | None,
        description: str,
        file: TextIO | None,
        interval_s: float = LINE_INTERVAL_S,
    ) -> None:
        self.n = 0
        self.total = total
        self.description = description
        self._iterable = iterable
        self._file = file
        self._interval_s = interval_s
        self._start = self._last_line = time.perf_counter()
        self._postfix = ""
        self._printed_n: int | None = None
        self._closed = False

    def __iter__(self) -> Iterator[T]:
        if self._iterable is None:
            raise ValueError(f"progress {self.description!r}: made without an iterable, so it cannot be looped over")
        with self:
            for item in self._iterable:
                yield item
                self.update(1)

    def __enter__(self) -> PlainProgress[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        self.n += n
        if time.perf_counter() - self._last_line >= self._interval_s:
            self._print()

    def set_postfix_str(self, text: str) -> None:
        self._postfix = text

    def close(self) -> None:
        """Print a last line, if there were lines before and the count has changed since."""
        if not self._closed and self._printed_n not in (None, self.n):
            self._print()
        self._closed = True

    def _print(self) -> None:
        self._last_line = time.perf_counter()
        self._printed_n = self.n
        if self._file is None:
            return
        elapsed = self._last_line - self._start
        rate = self.n / elapsed if elapsed > 0 else 0.0
        parts = [f"{self.description}: {self.n}"]
        if self.total:
            parts[0] += f"/{self.total} ({100 * self.n / self.total:.0f} %)"
        parts.append(f"{elapsed:.0f} s")
        if self.total and 0 < self.n < self.total and rate > 0:
            parts.append(f"{(self.total - self.n) / rate:.0f} s left")
        parts.append(f"{rate:.2f}/s" if rate < 10 else f"{rate:.0f}/s")
        if self._postfix:
            parts.append(self._postfix)
        print(", ".join(parts), file=self._file, flush=True)


def progress(
    iterable: Iterable[T] | None = None,
    description: str = "",
    *,
    total: int | None = None,
    is_writer: bool | None = None,
    unit: str = "it",
    leave: bool = True,
) -> tqdm | PlainProgress[T]:
    """Wrap an iterable, or count to ``total`` with ``update(n)`` inside a ``with``. Output goes to stderr.

    The result can be iterated, entered with ``with``, and has ``update``, ``set_postfix_str`` and ``close``.

    Args:
        iterable: Iterable to wrap; None: the caller counts.
        description: Text in front of the numbers.
        total: Number of items; None: the iterable's length if it has one.
        is_writer: Whether this process prints; None: torchrun's rank 0 does.
        unit: Unit of the bar.
        leave: Whether the bar stays on the terminal when it is done. False: for a bar inside the loop of another one.
    """
    if is_writer is None:
        is_writer = is_writer_rank()
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if is_writer and sys.stderr.isatty():
        return tqdm(
            iterable, desc=description, total=total, unit=unit, leave=leave, file=sys.stderr, dynamic_ncols=True
        )
    return PlainProgress(iterable, total, description, sys.stderr if is_writer else None)

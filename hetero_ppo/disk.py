"""Report a disk that accepts no more data: the file, the size it needs, the free space, and what to do."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hetero_ppo.errors import RunError

#: Error number of a disk that accepts no more data -> its text.
REASONS = {
    errno.ENOSPC: "no space is left there",
    errno.EDQUOT: "the quota there is used up",
    errno.EFBIG: "the file is larger than the process (ulimit -f) or the file system allows",
    errno.EROFS: "the file system is read-only",
}


def takes_no_more(error: OSError) -> bool:
    """Return whether an error is one of ``REASONS``."""
    return error.errno in REASONS


@contextmanager
def writing(
    path: Path, what: str, num_bytes: int | None = None, remedy: str = "choose another run.dir"
) -> Iterator[None]:
    """Report a disk that accepts no more data during the body. Other errors pass through.

    Args:
        path: File or folder that the body writes.
        what: Description of the file for the message.
        num_bytes: Size that the file will have; None: unknown.
        remedy: Advice for the case that no space can be freed.

    Raises:
        RunError: The disk accepts no more data.
    """
    try:
        yield
    except OSError as error:
        if not takes_no_more(error):
            raise
        raise RunError(describe(error, path, what, num_bytes, remedy)) from error


def describe(
    error: OSError, path: Path | None, what: str, num_bytes: int | None = None, remedy: str | None = None
) -> str:
    """Describe in words that a disk accepts no more data.

    Args:
        error: Error of the system; one of ``REASONS``.
        path: File or folder that was written; None: unknown.
        what: Description of the file for the message.
        num_bytes: Size that the file would have had; None: unknown.
        remedy: Advice for the case that no space can be freed; None: there is none.
    """
    assert error.errno is not None
    name = what if path is None else f"{what} {path}"
    needed = "" if num_bytes is None else f"; it takes {size_text(num_bytes)}"
    free = "" if path is None else f"; {free_text(path)}"
    advice = "Make room there" + ("" if remedy is None else f", or {remedy}")
    return f"{name} could not be written: {REASONS[error.errno]} ({os.strerror(error.errno)}){needed}{free}. {advice}"


def free_text(path: Path) -> str:
    """Describe how much space is free where a file or folder is, or would be."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return f"{size_text(shutil.disk_usage(there).free)} are free in {there if there.is_dir() else there.parent}"


def size_text(num_bytes: int) -> str:
    """Write a size with a binary unit: ``12.5 MiB``."""
    value, units = float(num_bytes), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.4g} {units[0]}"

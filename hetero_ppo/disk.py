"""A disk that takes no more is reported in words, whatever was being written: the file, what it needs, what is free, what to do."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hetero_ppo.errors import RunError

#: Errors of a disk that takes no more, in words.
REASONS = {
    errno.ENOSPC: "no space is left there",
    errno.EDQUOT: "the quota there is used up",
    errno.EFBIG: "the file is larger than the process (ulimit -f) or the file system allows",
    errno.EROFS: "the file system is read-only",
}


def takes_no_more(error: OSError) -> bool:
    """Whether an error is one of ``REASONS``."""
    return error.errno in REASONS


@contextmanager
def writing(
    path: Path, what: str, num_bytes: int | None = None, remedy: str = "choose another run.dir"
) -> Iterator[None]:
    """Report a disk that takes no more during the body. Other errors pass through.

    Args:
        path: File or folder that the body writes.
        what: Its name in the message.
        num_bytes: Size that it will have; None: unknown.
        remedy: What to do where no room can be made.

    Raises:
        RunError: The disk takes no more.
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
    """Say in words that a disk takes no more.

    Args:
        error: What the system said; one of ``REASONS``.
        path: File or folder that was written; None: unknown.
        what: Its name in the message.
        num_bytes: Size that it would have had; None: unknown.
        remedy: What to do where no room can be made; None: nothing is known.
    """
    assert error.errno is not None
    name = what if path is None else f"{what} {path}"
    needed = "" if num_bytes is None else f"; it takes {size_text(num_bytes)}"
    free = "" if path is None else f"; {free_text(path)}"
    advice = "Make room there" + ("" if remedy is None else f", or {remedy}")
    return f"{name} could not be written: {REASONS[error.errno]} ({os.strerror(error.errno)}){needed}{free}. {advice}"


def free_text(path: Path) -> str:
    """Say how much is free where a file or folder is, or would be."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return f"{size_text(shutil.disk_usage(there).free)} are free in {there if there.is_dir() else there.parent}"


def size_text(num_bytes: int) -> str:
    """Write a size with a binary unit: ``12.5 MiB``."""
    value, units = float(num_bytes), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.4g} {units[0]}"

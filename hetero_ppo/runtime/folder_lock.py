"""A lock that allows one run at a time in a run folder, and ends with its process.

The process of rank 0 locks ``<run.dir>/run.lock`` with flock(2) and writes into it who it is. The kernel releases the lock when the process
ends in any way; the file stays. Readers (``report``, ``export``) do not need the lock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

LOCK_FILE = "run.lock"
#: Seconds that a run waits for a lock: the process of a run that was just stopped may still be ending.
WAIT_S = 3.0
RETRY_S = 0.1
#: Error numbers of a file system that has no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class FolderLock:
    """The lock of one run folder, held in a ``with`` block.

    Raises:
        ValueError: Another process holds it.
        OSError: The lock file cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        """Take the path; nothing is locked yet.

        Args:
            folder: Run folder; it exists.
        """
        self.path = folder / LOCK_FILE
        self.note: str | None = None  # reason why there is no lock, for the user
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        # Python opens files close-on-exec, so a server that outlives this process does not keep the lock.
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._take(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        _held.add(descriptor)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            if self.note is None:
                os.ftruncate(self._descriptor, 0)
            _held.discard(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

    def _take(self, descriptor: int) -> None:
        end = time.monotonic() + WAIT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ValueError(describe_holder(self.path)) from None
                time.sleep(RETRY_S)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                self.note = (
                    f"run.dir is {str(self.path.parent)!r}: its file system has no locks ({error.strerror}), so a second run in "
                    "this folder would not be noticed"
                )
                return
        text = json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "job": os.environ.get("SLURM_JOB_ID"),
                "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            }
        )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode() + b"\n", 0)


def find_holder(folder: Path) -> str | None:
    """Return the error that names the run in a folder; None if no run works there. Does not keep the lock.

    Args:
        folder: Run folder, which need not exist.
    """
    path = folder / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # there was no run yet, or the file cannot be read
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return describe_holder(path)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None


def describe_holder(path: Path) -> str:
    """Return the error for a folder that is in use.

    Args:
        path: Lock file of the folder.
    """
    try:
        found = json.loads(path.read_text())
        job = "" if found["job"] is None else f", Slurm job {found['job']}"
        who = f"process {found['pid']} on {found['host']}{job}, since {found['started']}"
    except (ValueError, KeyError, TypeError, OSError):  # the file is just being written
        who = "another process"
    return (
        f"run.dir is {str(path.parent)!r}: a run is working there ({who}). Two runs in one folder would mix their files; "
        "stop that one, or wait for its end, or choose another run.dir"
    )


_held: set[int] = set()


def _close_in_child() -> None:
    """Close the locks in a forked process, so that a child that outlives this process does not keep them."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)

"""A process' directory for sockets, temporary files and weights of its servers, which does not stay behind.

The process removes it, or when that was killed a server's guardian does. Where both were killed at once, as Slurm ends a job, the
next run of the same user on the node does: a directory in use is locked (flock), and the system ends a lock with its process.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import BinaryIO

PREFIX = "hetero_ppo_"
LOCK = "in_use"


class PrivateDir:
    """A new directory (mode 0700), in shared memory where the machine has it. Directories that killed runs left are removed before.

    Attributes:
        path: of the directory; short, for unix sockets.
    """

    def __init__(self) -> None:
        parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
        remove_left_behind(Path(parent))
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        lock = open(self.path / f"{LOCK}.new", "wb")  # noqa: SIM115  open as long as the directory is in use
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(self.path / f"{LOCK}.new", self.path / LOCK)  # nobody finds it without its lock
        self._remove = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    def remove(self) -> None:
        """With all that is in it. May be called more than once; at the end of the interpreter it is called by itself."""
        self._remove()


def _remove(path: Path, lock: BinaryIO, owner: int) -> None:
    if os.getpid() == owner:  # a process that it forked leaves it alone
        shutil.rmtree(path, ignore_errors=True)  # a guardian may be at it too
    lock.close()


def remove_left_behind(parent: Path) -> None:
    """Remove this user's directories below ``parent`` whose process is gone."""
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            if folder.stat().st_uid != os.getuid():  # other users' cannot be looked into
                continue
            with (folder / LOCK).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except (BlockingIOError, FileNotFoundError, NotADirectoryError):  # in use; removed meanwhile; no run's directory
            continue

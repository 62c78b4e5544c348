"""A process' directory for what it shares with its servers, or with the ranks of its node, which does not stay behind.

The process removes it, or when that was killed a server's guardian does. Where both were killed at once, as Slurm ends a job, the
next run of the same user on the node does: a directory in use is locked (flock), and the system ends a lock with its process.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import stat
import tempfile
import weakref
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)

PREFIX = "hetero_ppo_"
LOCK = "in_use"


class PrivateDir:
    """A new directory (mode 0700). Directories that killed runs left beside it are removed before.

    Attributes:
        path: of the directory; short, for unix sockets.
    """

    def __init__(self, parent: Path | None = None) -> None:
        """Make it.

        Args:
            parent: Where; None: in shared memory where the machine has it, else below TMPDIR.
        """
        if parent is None:
            parent = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir())
        remove_left_behind(parent)
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
    """Remove this user's directories below ``parent`` whose process is gone.

    Anybody may put anything under our names into a shared directory, so nothing there is followed, opened or waited for unless it is
    a directory of this user, and nothing there ends a run.
    """
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            _remove_unless_in_use(folder)
        except OSError as error:  # in use; removed meanwhile; no run's directory; damaged
            log.debug("%s stays: %s", folder, error)


def _remove_unless_in_use(folder: Path) -> None:
    """Raises OSError where the folder is in use, is not this user's, or is no run's directory."""
    # The descriptor stays on the directory that was looked at, whatever its name stands for later.
    folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(folder_fd).st_uid != os.getuid():
            return
        if not stat.S_ISREG(os.stat(LOCK, dir_fd=folder_fd, follow_symlinks=False).st_mode):
            return
        with open(os.open(LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder_fd), "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Only its owner can rename a directory in a directory with the sticky bit: the name is still ours.
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(folder_fd)

"""A temporary directory that a process shares with its servers or with the ranks of its node, and that does not stay behind.

The process removes it. If the process was killed, a server's guardian does. If both were killed together, as when Slurm ends a job, the next
run of the same user on the node does: a directory in use is locked (flock), and the system releases a lock when its process ends.
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
    """A new directory (mode 0700). Directories that killed runs left next to it are removed first.

    Attributes:
        path: Path of the directory; short, because unix sockets need that.
    """

    def __init__(self, parent: Path | None = None) -> None:
        """Create the directory.

        Args:
            parent: Folder for it; None: shared memory if the machine has it, otherwise TMPDIR.
        """
        if parent is None:
            parent = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir())
        remove_left_behind(parent)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        lock = open(self.path / f"{LOCK}.new", "wb")  # noqa: SIM115  open as long as the directory is in use
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(self.path / f"{LOCK}.new", self.path / LOCK)  # so that nobody finds the directory without its lock
        self._remove = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    def remove(self) -> None:
        """Remove the directory and its contents. It may be called more than once, and is called at the end of the interpreter."""
        self._remove()


def _remove(path: Path, lock: BinaryIO, owner: int) -> None:
    if os.getpid() == owner:  # a forked process must not remove it
        shutil.rmtree(path, ignore_errors=True)  # a guardian may be removing it too
    lock.close()


def remove_left_behind(parent: Path) -> None:
    """Remove this user's directories below ``parent`` whose process has ended.

    In a shared directory anybody may create files with our names. So nothing there is followed, opened or waited for unless it is a directory
    of this user, and an error there does not end a run.
    """
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            _remove_unless_in_use(folder)
        except OSError as error:  # in use, removed meanwhile, not a run's directory, or damaged
            log.debug("%s stays: %s", folder, error)


def _remove_unless_in_use(folder: Path) -> None:
    """Remove a directory that a killed run has left.

    Raises:
        OSError: The directory is in use, or is not a run's directory.
    """
    # The descriptor stays on the checked directory, even if its name later stands for another one.
    folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(folder_fd).st_uid != os.getuid():
            return
        if not stat.S_ISREG(os.stat(LOCK, dir_fd=folder_fd, follow_symlinks=False).st_mode):
            return
        with open(os.open(LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder_fd), "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # In a directory with the sticky bit only the owner can rename a directory, so the name still stands for ours.
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(folder_fd)

"""Share data on a node: its first rank reads and tokenises once, and the other ranks wait for the files that it writes."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import torch.distributed as dist

from hetero_ppo.distributed.text import broadcast_text
from hetero_ppo.private_dir import PrivateDir

T = TypeVar("T")

POLL_S = 0.05
_DONE, _FAILED, _OPENED = "done", "failed", "opened"


class DataPlace(Protocol):
    """Interface that decides which process reads a data set, and where its files are written."""

    def share(self, build: Callable[[Path], None], open_files: Callable[[Path], T]) -> T:
        """Return what ``open_files`` makes of the folder that ``build`` has filled. Afterwards the folder is removed.

        Args:
            build: Function that writes the files.
            open_files: Function that opens them, so that their names are not needed any more.

        Raises:
            ValueError, FileNotFoundError: ``build`` raised it.
        """


class OwnFiles:
    """Data place of a process that reads its data alone."""

    def share(self, build: Callable[[Path], None], open_files: Callable[[Path], T]) -> T:
        """Build and open the files in this process (``DataPlace.share``)."""
        with _private_folder() as folder:
            build(folder)
            return open_files(folder)


#: Data place of a run with one process.
OWN_FILES = OwnFiles()


class NodeFiles:
    """Data place of a run with several ranks: the first rank of every node reads."""

    def __init__(self, world: dist.ProcessGroup) -> None:
        """Read this rank's place on its node from the environment.

        Args:
            world: Group of all ranks of the run.
        """
        self.world = world
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.local_size = int(os.environ["LOCAL_WORLD_SIZE"])

    def share(self, build: Callable[[Path], None], open_files: Callable[[Path], T]) -> T:
        """Build the files on the node's first rank and open them on all its ranks (``DataPlace.share``).

        Collective over the world at its beginning. An error of the first rank is raised on all ranks of its node.
        """
        if self.local_rank > 0:
            return self._follow(Path(self._agree("")), open_files)
        with _private_folder() as folder:
            self._agree(str(folder))
            try:
                build(folder)
            except (ValueError, FileNotFoundError) as error:
                _publish(folder, _FAILED, str(error))
                self._wait_for_peers(folder)
                raise
            _publish(folder, _DONE, "")
            opened = open_files(folder)
            self._wait_for_peers(folder)
            return opened

    def _agree(self, own: str) -> str:
        """Return the folder of this node. The first rank of every node broadcasts its folder, one broadcast per node."""
        this_node = self.world.rank() // self.local_size
        folders = [broadcast_text(own, first, self.world) for first in range(0, self.world.size(), self.local_size)]
        return folders[this_node]

    def _follow(self, folder: Path, open_files: Callable[[Path], T]) -> T:
        # No collective: tokenising may take longer than a collective's time limit. The launcher ends the ranks when the first one dies.
        while True:
            if (folder / _FAILED).exists():
                text = (folder / _FAILED).read_text(encoding="utf-8")
                _publish(folder, f"{_OPENED}.{self.local_rank}", "")
                raise ValueError(text)
            if (folder / _DONE).exists():
                opened = open_files(folder)
                _publish(folder, f"{_OPENED}.{self.local_rank}", "")
                return opened
            time.sleep(POLL_S)

    def _wait_for_peers(self, folder: Path) -> None:
        while sum(1 for _ in folder.glob(f"{_OPENED}.*")) < self.local_size - 1:
            time.sleep(POLL_S)


def node_files(world: dist.ProcessGroup) -> DataPlace:
    """Return the data place of a training run whose ranks are ``world``."""
    return NodeFiles(world) if world.size() > 1 else OWN_FILES


def _publish(folder: Path, name: str, text: str) -> None:
    """Write a file that other processes see either complete or not at all."""
    hidden = folder / f".{name}"
    hidden.write_text(text, encoding="utf-8")
    hidden.rename(folder / name)


@contextmanager
def _private_folder() -> Iterator[Path]:
    # Not in shared memory: it may be as large as the data. The next run removes a folder that a killed run has left.
    folder = PrivateDir(Path(tempfile.gettempdir()))
    try:
        yield folder.path
    finally:
        folder.remove()

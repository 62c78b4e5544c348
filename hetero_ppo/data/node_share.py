"""Data that is read and tokenised once on every node: by its first rank, while the others wait for the files that it writes."""

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


class Place(Protocol):
    """Where a data set's files are written, and who reads them."""

    def share(self, build: Callable[[Path], None], open_files: Callable[[Path], T]) -> T:
        """Return what ``open_files`` makes of the folder that ``build`` has filled; the folder is gone afterwards.

        Args:
            build: Writes the files.
            open_files: Opens them, so that their names are not needed any more.

        Raises:
            ValueError, FileNotFoundError: what ``build`` raises.
        """


class OwnFiles:
    """A process that reads its data by itself."""

    def share(self, build: Callable[[Path], None], open_files: Callable[[Path], T]) -> T:
        """See ``Place``."""
        with _private_folder() as folder:
            build(folder)
            return open_files(folder)


#: Without a run of several processes.
OWN_FILES = OwnFiles()


class NodeFiles:
    """The ranks of a run; the first one of every node reads. Collective over the world at its beginning."""

    def __init__(self, world: dist.ProcessGroup) -> None:
        """Args:
        world: Group of all ranks of the run.
        """
        self.world = world
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.local_size = int(os.environ["LOCAL_WORLD_SIZE"])

    def share(self, build: Callable[[Path], None], open_files: Callable[[Path], T]) -> T:
        """See ``Place``. An error of the first rank is raised on all ranks of its node."""
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
        """The folder of this node. One broadcast a node: the first ranks of all nodes tell theirs."""
        this_node = self.world.rank() // self.local_size
        folders = [broadcast_text(own, first, self.world) for first in range(0, self.world.size(), self.local_size)]
        return folders[this_node]

    def _follow(self, folder: Path, open_files: Callable[[Path], T]) -> T:
        # No collective: tokenising may take longer than a collective may. The launcher ends the ranks when the first one dies.
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


def node_files(world: dist.ProcessGroup) -> Place:
    """Return the place for the data of a training run, whose ranks are ``world``."""
    return NodeFiles(world) if world.size() > 1 else OWN_FILES


def _publish(folder: Path, name: str, text: str) -> None:
    """Write a file that others see complete or not at all."""
    hidden = folder / f".{name}"
    hidden.write_text(text, encoding="utf-8")
    hidden.rename(folder / name)


@contextmanager
def _private_folder() -> Iterator[Path]:
    # Not in shared memory: it may be as large as the data. One that a killed run has left goes with the next run's.
    folder = PrivateDir(Path(tempfile.gettempdir()))
    try:
        yield folder.path
    finally:
        folder.remove()

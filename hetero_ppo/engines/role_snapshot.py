"""A role's checkpoint in two parts: a copy in host memory, for which training stands still, and the files, which a thread writes.

Megatron-Core plans a save, knows its files' format and finishes it (``dist_checkpointing.save(async_sharded_save=True)``). What
lies between, the writing, its own callers do in processes that they fork, or spawn and pickle everything to. A forked writer
outlives a rank that is killed, and keeps the sockets open by whose end its peers would know. So a thread of the rank writes, with
Megatron-Core's own writer; torch hands tensors to files without the interpreter's lock.
"""

from __future__ import annotations

import os
import queue
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch import Tensor


#: Bytes that the small files of a role need at most.
TRIED_BYTES = 1 << 16


class RoleSnapshot:
    """A copy of everything that a role saves, as it was when the copy was made."""

    def __init__(self, state: dict[str, Any], folder: Path, live: set[int]) -> None:
        """Plan the save and copy what this rank writes of it. Collective over the world.

        Args:
            state: Sharded state dict of the role.
            folder: Existing empty folder.
            live: Addresses of the storages that training changes. Tensors of other storages are not copied.

        Raises:
            OSError: The disk cannot be written.
        """
        # The writer puts its reports into this queue. Every save has its own.
        self._reports: queue.Queue[Any] = queue.Queue()
        filesystem_async._results_queue = self._reports
        try:
            request = dist_checkpointing.save(state, str(folder), async_sharded_save=True)
        except RuntimeError:  # torch.save of a small file hides the system's reason behind "iostream error"
            _try_to_write(folder)
            raise
        self._finish = request.finalize_fns
        self._transforms: list[Any] = []
        self._buckets: list[tuple[str, str, tuple[list[Any], list[tuple[Any, Tensor]]]]] = []
        if request.async_fn is not None:  # this rank has something to write
            self._transforms, _ = request.async_fn.args
            for name, key, (texts, tensors) in request.preload_fn():  # device tensors are in host memory
                copies = [(item, t.clone() if t.untyped_storage().data_ptr() in live else t) for item, t in tensors]
                self._buckets.append((name, key, (texts, copies)))
        self.files = [Path(name) for name, _, _ in self._buckets]
        # Of this rank's tensors.
        self.num_bytes = sum(tensor.nbytes for _, _, (_, tensors) in self._buckets for _, tensor in tensors)

    def write(self) -> bool:
        """Write this rank's files and wait until they are on the disk. From any thread.

        Returns:
            Whether the files are on the disk. If they are not, ``finish`` raises the reason.
        """
        written: dict[int, list[Any]] = {}
        while self._buckets:
            bucket, number = self._buckets.pop(0), len(written)
            reports: queue.Queue[tuple[int, Any]] = queue.Queue()
            unfinished: queue.Queue[int] = queue.Queue()
            unfinished.put(number)
            FileSystemWriterAsync.write_preloaded_data(
                self._transforms, number, bucket, reports, unfinished, use_fsync=True
            )
            _, report = reports.get_nowait()
            if isinstance(report, Exception):
                self._reports.put(report)
                return False
            written[number] = report
        self._reports.put(written)
        return True

    def finish(self) -> None:
        """Write the description of all ranks' files, after all ranks have called ``write``. Collective over the world.

        Raises:
            CheckpointException: A rank could not write its files. All ranks raise it.
            OSError: This rank could not write the description.
        """
        for function in self._finish:
            function()


def _try_to_write(folder: Path) -> None:
    """Write a small file, so that a full or broken disk raises the system's own error."""
    path = folder / "written_to_see"
    with path.open("wb") as file:
        file.write(bytes(TRIED_BYTES))
        file.flush()
        os.fsync(file.fileno())
    path.unlink()

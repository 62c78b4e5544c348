"""A checkpoint that a thread is writing: between its snapshot and its marker."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from hetero_ppo.checkpoint.manifest import file_digest
from hetero_ppo.engines.role_snapshot import RoleSnapshot
from hetero_ppo.errors import RunError

#: Seconds that a failing run waits for its writing thread: the interpreter would crash if it ended during the write.
END_WITHIN_S = 60.0


@dataclass(frozen=True)
class PendingSave:
    """One checkpoint that is being written."""

    step: int
    folder: Path  # its name when it is complete
    partial: Path  # folder that it is written into
    snapshots: Sequence[RoleSnapshot]
    then: Callable[[], None]  # is called when it is complete
    written: Future[None]
    world: dist.ProcessGroup  # all ranks

    @classmethod
    def begin(
        cls,
        step: int,
        folder: Path,
        partial: Path,
        snapshots: Sequence[RoleSnapshot],
        then: Callable[[], None],
        own: Path,
        world: dist.ProcessGroup,
    ) -> PendingSave:
        """Start the thread that writes.

        Args:
            step: Number of steps done.
            folder: Name of the checkpoint when it is complete.
            partial: Folder that it is written into.
            snapshots: Snapshots of all roles.
            then: Function that is called when the checkpoint is complete.
            own: File of this rank that is already written.
            world: Group of all ranks.
        """
        written: Future[None] = Future()

        def work() -> None:
            try:
                _write(partial, snapshots, own, world.rank())
            except BaseException as error:  # noqa: BLE001  the future's ``result`` raises it
                written.set_exception(error)
            else:
                written.set_result(None)

        threading.Thread(target=work, name="checkpoint", daemon=True).start()
        return cls(step, folder, partial, snapshots, then, written, world)

    def is_written_everywhere(self) -> bool:
        """Return whether all ranks have written their files, or failed to. Collective over the world."""
        done = torch.tensor([int(self.written.done())])
        dist.all_reduce(done, op=dist.ReduceOp.MIN, group=self.world)
        return bool(done)

    def wait(self, timeout_s: float) -> None:
        """Wait until this rank's files are written. Raises the error of the writing thread, if it failed.

        Raises:
            RunError: The files are not written within ``timeout_s``.
        """
        try:
            self.written.result(timeout_s)
        except TimeoutError as error:
            if self.written.done():  # it is the thread's own error
                raise
            raise RunError(
                f"phase checkpoint, rank {self.world.rank()}: the files of step {self.step} are not written below {self.partial} within "
                f"{timeout_s / 60:g} min (run.timeout_minutes); the disk does not answer, or is slower than the run saves"
            ) from error

    def abandon(self) -> None:
        """Wait until the thread ends; the checkpoint will never be complete."""
        try:
            self.written.exception(END_WITHIN_S)
        except TimeoutError:
            return  # the thread waits for the disk, and there the end of the interpreter does no harm


def share_file(partial: Path, rank: int) -> Path:
    """Return the file in which a rank lists the files that it has written."""
    return partial.with_name(f"{partial.name}.files_{rank:05d}")


def _write(partial: Path, snapshots: Sequence[RoleSnapshot], own: Path, rank: int) -> None:
    """Write this rank's files, and their sizes and checksums."""
    files = [own]
    for snapshot in snapshots:
        if not snapshot.write():
            return  # ``finish`` of the snapshot says why, on all ranks
        files += snapshot.files
    share = {str(path.relative_to(partial)): file_digest(path, fsync=True) for path in files}
    share_file(partial, rank).write_text(json.dumps(share))

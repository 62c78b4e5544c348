"""A checkpoint between its snapshot and its marker: what is written by a thread, and how that ended."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from hetero_ppo.checkpoint.manifest import look_at
from hetero_ppo.engines.role_snapshot import RoleSnapshot
from hetero_ppo.errors import RunError

#: Seconds that a run which fails waits for its writing thread: an interpreter that ends under it would crash.
END_WITHIN_S = 60.0


@dataclass(frozen=True)
class PendingSave:
    """One checkpoint on its way to the disk."""

    step: int
    folder: Path  # the name that it takes when it is complete
    beside: Path  # where it is written
    snapshots: Sequence[RoleSnapshot]
    then: Callable[[], None]  # called when it is complete
    written: Future[None]
    world: dist.ProcessGroup  # all ranks

    @classmethod
    def begin(
        cls,
        step: int,
        folder: Path,
        beside: Path,
        snapshots: Sequence[RoleSnapshot],
        then: Callable[[], None],
        own: Path,
        world: dist.ProcessGroup,
    ) -> PendingSave:
        """Start to write in a thread.

        Args:
            step: steps done.
            folder: the name that the checkpoint takes when it is complete.
            beside: where it is written.
            snapshots: of all roles.
            then: called when it is complete.
            own: file of this rank that is written already.
            world: Group of all ranks.
        """
        written: Future[None] = Future()

        def work() -> None:
            try:
                _write(beside, snapshots, own, world.rank())
            except BaseException as error:  # noqa: BLE001  raised by whoever asks for the result
                written.set_exception(error)
            else:
                written.set_result(None)

        threading.Thread(target=work, name="checkpoint", daemon=True).start()
        return cls(step, folder, beside, snapshots, then, written, world)

    def is_written_everywhere(self) -> bool:
        """Whether all ranks have written their files, or failed to. Collective over the world."""
        done = torch.tensor([int(self.written.done())])
        dist.all_reduce(done, op=dist.ReduceOp.MIN, group=self.world)
        return bool(done)

    def wait(self, timeout_s: float) -> None:
        """Until this rank's files are written; raises what the thread raised.

        Raises:
            RunError: they are not, within ``timeout_s``.
        """
        try:
            self.written.result(timeout_s)
        except NotInTime as error:
            if self.written.done():  # the thread's own
                raise
            raise RunError(
                f"phase checkpoint, rank {self.world.rank()}: the files of step {self.step} are not written below {self.beside} within "
                f"{timeout_s / 60:g} min (run.timeout_minutes); the disk does not answer, or is slower than the run saves"
            ) from error

    def abandon(self) -> None:
        """Let the thread come to its end; the checkpoint never becomes one."""
        try:
            self.written.exception(END_WITHIN_S)
        except NotInTime:
            return  # it hangs in the disk, where the end of the interpreter does not disturb it


def share_file(beside: Path, rank: int) -> Path:
    """Where a rank says what it has written."""
    return beside.with_name(f"{beside.name}.files_{rank:05d}")


def _write(beside: Path, snapshots: Sequence[RoleSnapshot], own: Path, rank: int) -> None:
    """Write this rank's files, and their sizes and checksums."""
    files = [own]
    for snapshot in snapshots:
        if not snapshot.write():
            return  # ``finish`` of the snapshot says why, on all ranks
        files += snapshot.files
    share = {str(path.relative_to(beside)): look_at(path, settle=True) for path in files}
    share_file(beside, rank).write_text(json.dumps(share))

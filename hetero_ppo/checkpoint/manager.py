"""Checkpoints of the trained roles, written with Megatron-Core's dist_checkpointing.

``<run.dir>/checkpoints/iter_0000100/<role>/`` holds each role's weights and optimizer, ``trainer.json`` the trainer's state, ``rng/`` the
random-number generators of every rank, and ``config.yaml`` the resolved configuration. All files are written into ``iter_0000100.tmp/``;
``COMPLETE``, with the sizes and checksums of all others, comes last. Then the folder is renamed: a folder without ``.tmp`` has all roles of
one step. ``latest_checkpointed_iteration.txt`` names the newest step.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from hetero_ppo.checkpoint.manifest import (
    COMPLETE,
    files_of,
    find_fault,
    file_digest,
    find_size_fault,
    fsync_dir,
    has_own_checksum,
    write_marker,
    write_text,
)
from hetero_ppo.checkpoint.pending import PendingSave, share_file
from hetero_ppo.checkpoint.random_state import random_state, set_random_state
from hetero_ppo.checkpoint.version import code_version
from hetero_ppo.config.schema import CheckpointConfig
from hetero_ppo.disk import free_text, size_text
from hetero_ppo.engines.role_snapshot import RoleSnapshot
from hetero_ppo.engines.train_engine import TrainEngine
from hetero_ppo.errors import RunError

log = logging.getLogger(__name__)

LATEST = "latest_checkpointed_iteration.txt"
#: File that names the step whose weights ``<run.dir>/hf`` has. It exists as long as there is no newer checkpoint.
EXPORTED = "exported_iteration.txt"
STATE = "trainer.json"
PARTIAL_SUFFIX = ".tmp"
#: Run id of checkpoints from a version of this code that wrote none.
UNNAMED = "unnamed"


class CheckpointManager:
    """Saves and loads all trained roles and the trainer's state together. Use it in a ``with`` block, which ends the writing thread."""

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        world: dist.ProcessGroup,
        *,
        timeout_s: float,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Take the settings; nothing is read or written.

        Args:
            run_dir: Folder of this run, which has its ``config.yaml``.
            config: Checkpoint section of the configuration.
            world: Group of all ranks.
            timeout_s: Seconds that a rank waits for its disk.
            about: Facts about the run that every checkpoint stores, as JSON: ``run_id``, and more. Checkpoints of other runs are left alone.
        """
        self.run_dir = run_dir
        self.root = run_dir / "checkpoints"
        self.config = config
        self.world = world
        self.timeout_s = timeout_s
        self.about = {"run_id": UNNAMED, **(about or {})}
        self._pending: PendingSave | None = None
        self._num_bytes = 0  # size of this rank's part of the last checkpoint
        self._version = code_version() if world.rank() == 0 else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pending is not None:  # the run fails, so some ranks may be missing to finish the checkpoint together
            self._pending.abandon()

    @property
    def is_saving(self) -> bool:
        """True while a checkpoint is being written; the same on every rank."""
        return self._pending is not None

    def save(
        self,
        step: int,
        engines: Mapping[str, TrainEngine],
        state: Mapping[str, Any],
        metrics: Mapping[str, float],
        files: Mapping[str, str] | None = None,
        *,
        wait: bool,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Save one checkpoint; a reader sees all of it or none. Collective over the world.

        With ``checkpoint.async_save`` the state is copied, and written while the run continues; ``finish`` makes the checkpoint complete. The
        previous checkpoint is finished first.

        Args:
            step: Number of steps done.
            engines: Trained roles by name.
            state: State from which the trainer can continue, as JSON.
            metrics: Metrics of the step; ``checkpoint.keep_best`` names one of them.
            files: Name -> text of further files that belong to the weights.
            wait: Whether to wait until the checkpoint is complete, because no work follows that could run in parallel.
            then: Function that is called when the checkpoint is complete.

        Raises:
            RunError: This checkpoint, or the previous one, could not be written. Complete checkpoints are unchanged.
        """
        self.finish(wait=True)
        folder = self.root / f"iter_{step:07d}"
        partial = folder.with_name(folder.name + PARTIAL_SUFFIX)
        self._num_bytes = sum(engine.checkpoint_bytes for engine in engines.values())
        with self._describe_errors(step):
            snapshots = self._snapshot(partial, step, engines, {**state, "metrics": dict(metrics)}, files or {})
            own = _rng_file(partial, self.world.rank())
            self._pending = PendingSave.begin(step, folder, partial, snapshots, then, own, self.world)
        if wait or not self.config.async_save:
            self.finish(wait=True)

    def finish(self, *, wait: bool) -> None:
        """Complete the checkpoint that is being written, if there is one. Collective over the world.

        Args:
            wait: Whether to wait for its files; False: it stays pending until all ranks have written theirs.

        Raises:
            RunError: The checkpoint could not be written, or not in time.
        """
        pending = self._pending
        if pending is None or not (wait or pending.is_written_everywhere()):
            return
        with self._describe_errors(pending.step):
            pending.wait(self.timeout_s)
            for snapshot in pending.snapshots:
                snapshot.finish()
            if self.world.rank() == 0:
                write_marker(pending.partial, _manifest(pending.partial))
                self._put_in_place(pending.partial, pending.folder, pending.step)
        dist.barrier(self.world)
        self._pending = None
        pending.then()

    def check_room(self, engines: Mapping[str, TrainEngine]) -> None:
        """Check that a first checkpoint fits on the disk. Collective over the world; call it before the first step.

        Raises:
            ValueError: It does not fit.
        """
        needed = torch.tensor([sum(engine.checkpoint_bytes for engine in engines.values())])
        dist.all_reduce(needed, group=self.world)
        if self.world.rank() == 0:
            free = shutil.disk_usage(self.run_dir).free
            if free < int(needed):
                raise ValueError(
                    f"run.dir is {str(self.run_dir)!r}: a checkpoint takes {int(needed) / 2**30:.3g} GiB and {free / 2**30:.3g} GiB are "
                    f"free there; with checkpoint.keep={self.config.keep} there are up to {self.config.keep + 1} at a time"
                )
        dist.barrier(self.world)

    def load(self, load_dir: Path, engines: Mapping[str, TrainEngine], expected: Collection[str]) -> dict[str, Any]:
        """Restore a complete checkpoint of a run folder into the engines. Collective over the world.

        Args:
            load_dir: Folder of the run that wrote the checkpoint.
            engines: Trained roles by name.
            expected: Names in the trainer's state that the caller will read.

        Returns:
            The trainer's state, with ``step``.

        Raises:
            ValueError: There is no complete checkpoint, it is damaged, or it lacks a role or a part of the state.
        """
        folder = checkpoint_folder(load_dir, self.config.step)
        self._check_contents(folder)
        state = _read_state(folder, {"step", "world_size", *expected})
        for role, engine in engines.items():
            if not (folder / role).is_dir():
                raise ValueError(f"checkpoint {folder} has no role {role!r}: it was written by another kind of run")
            with engine.on_device(grads=True, optimizer=True, phase="load"):
                engine.load(folder / role)
        if state["world_size"] == self.world.size():
            set_random_state(json.loads(_rng_file(folder, self.world.rank()).read_text()))
        return state

    def _snapshot(
        self,
        partial: Path,
        step: int,
        engines: Mapping[str, TrainEngine],
        state: Mapping[str, Any],
        files: Mapping[str, str],
    ) -> list[RoleSnapshot]:
        """Copy the roles, and write the small files."""
        if self.world.rank() == 0:
            for left_by_a_killed_run in self.root.glob(f"iter_*{PARTIAL_SUFFIX}*"):
                remove = shutil.rmtree if left_by_a_killed_run.is_dir() else Path.unlink
                remove(left_by_a_killed_run)
            for name in (*engines, "rng"):
                (partial / name).mkdir(parents=True)
        dist.barrier(self.world)
        snapshots = [engine.save(partial / role) for role, engine in engines.items()]
        _rng_file(partial, self.world.rank()).write_text(json.dumps(random_state()))
        if self.world.rank() == 0:
            about = {"step": step, "world_size": self.world.size(), "code_version": self._version}
            (partial / STATE).write_text(json.dumps({**about, **self.about, **state}, indent=1))
            for name, text in files.items():
                (partial / name).write_text(text)
            shutil.copyfile(self.run_dir / "config.yaml", partial / "config.yaml")
        return snapshots

    def _put_in_place(self, partial: Path, folder: Path, step: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        (self.root / EXPORTED).unlink(missing_ok=True)
        write_text(self.root / LATEST, str(step))
        fsync_dir(self.root)
        self._retire(step)

    def _retire(self, step: int) -> None:
        """Keep this run's newest checkpoints and its best one by ``checkpoint.keep_best``; remove its others.

        A later step than ``step`` remains from before the run was resumed at an earlier checkpoint.
        """
        # None, an unreadable run id, counts as this run's: it began in a folder without checkpoints.
        own = (self.about["run_id"], None)
        complete = [folder for folder in _complete(self.root) if run_id_of(folder) in own]
        until_now = [folder for folder in complete if _step_of(folder) <= step]
        kept = set(until_now[-self.config.keep :])
        if self.config.keep_best is not None:
            best = best_checkpoint(until_now, self.config.keep_best)
            kept |= set() if best is None else {best}
        for folder in complete:
            if folder not in kept:
                shutil.rmtree(folder)

    def _check_contents(self, folder: Path) -> None:
        if self.world.rank() == 0 and not has_own_checksum(folder):
            log.info(
                f"checkpoint {folder}: an older version wrote it, without a checksum of its list of files ({COMPLETE})"
            )
        fault = find_fault(folder, self.world.rank(), self.world.size())
        worst = torch.tensor([int(fault is not None)])
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=self.world)
        if fault is not None:
            raise ValueError(_describe_damage(folder, fault))
        if bool(worst):
            raise ValueError(_describe_damage(folder, "another rank reports which file"))

    @contextlib.contextmanager
    def _describe_errors(self, step: int) -> Iterator[None]:
        """Turn an error of the body into an error of the run that names the checkpoint."""
        try:
            yield
        except (OSError, CheckpointException) as error:
            raise RunError(self._describe_unwritable(step, error)) from error

    def _describe_unwritable(self, step: int, error: OSError | CheckpointException) -> str:
        steps = ", ".join(str(_step_of(folder)) for folder in _complete(self.root)) or "none"
        return (
            f"phase checkpoint: the checkpoint of step {step} could not be written below {self.root}: {_reason(error)}; this rank's part "
            f"takes {size_text(self._num_bytes)}; {free_text(self.root)}. Make room there, or choose another run.dir. Complete checkpoints of this run: {steps}"
        )


def checkpoint_folder(run_dir: Path, step: int | None) -> Path:
    """Return the folder of a complete checkpoint below a run folder.

    Args:
        run_dir: Folder of the run that wrote it.
        step: Step of the checkpoint; None: the newest.

    Raises:
        ValueError: There is none, or a file of it is missing or has another size.
    """
    root = run_dir / "checkpoints"
    complete = _complete(root)
    if not complete:
        raise ValueError(f"{run_dir}: no complete checkpoint below {root}")
    folder = complete[-1] if step is None else root / f"iter_{step:07d}"
    if folder not in complete:
        steps = ", ".join(str(_step_of(path)) for path in complete)
        raise ValueError(f"{run_dir}: no complete checkpoint of step {step}; there are: {steps}")
    fault = find_size_fault(folder)
    if fault is not None:
        raise ValueError(_describe_damage(folder, fault))
    return folder


def check_contents(folder: Path) -> None:
    """Compare all files of a checkpoint with its manifest, in one process.

    Args:
        folder: Folder of the checkpoint (``checkpoint_folder``).

    Raises:
        ValueError: A file differs.
    """
    fault = find_fault(folder, 0, 1)
    if fault is not None:
        raise ValueError(_describe_damage(folder, fault))


def complete_checkpoints(run_dir: Path) -> dict[int, Path]:
    """Return step -> folder of the complete checkpoints of a run folder, the oldest first. The run folder need not exist."""
    return {_step_of(folder): folder for folder in _complete(run_dir / "checkpoints")}


def run_id_of(folder: Path) -> str | None:
    """Return the id of the run that wrote a checkpoint; None if it cannot be read."""
    try:
        return str(json.loads((folder / STATE).read_text()).get("run_id", UNNAMED))
    except (OSError, ValueError):
        return None


def read_state(folder: Path) -> dict[str, Any]:
    """Return the trainer's state in a complete checkpoint, with ``step``."""
    return _read_state(folder, {"step"})


def checkpoint_step(run_dir: Path, step: int | None) -> int:
    """Return the number of steps that were done before a complete checkpoint of a run folder.

    Args:
        run_dir: Folder of the run that wrote it.
        step: Step of the checkpoint; None: the newest.

    Raises:
        ValueError: There is none, or it is damaged.
    """
    return int(_read_state(checkpoint_folder(run_dir, step), {"step"})["step"])


def mark_exported(run_dir: Path, step: int) -> None:
    """Note that the weights of the newest checkpoint, that of ``step``, are exported."""
    write_text(run_dir / "checkpoints" / EXPORTED, str(step))


def is_exported(run_dir: Path, step: int) -> bool:
    """Return whether the weights of the checkpoint of ``step`` are exported."""
    path = run_dir / "checkpoints" / EXPORTED
    return path.is_file() and path.read_text() == str(step)


def best_checkpoint(folders: list[Path], metric: str) -> Path | None:
    """Return the checkpoint with the highest value of a metric, or with the lowest for ``-metric``; the later one of equals.

    Args:
        folders: Complete checkpoints, the oldest first; those whose step has no such metric are skipped.
        metric: Name of the metric, with a leading ``-`` if less is better.
    """
    name, sign = metric.removeprefix("-"), -1.0 if metric.startswith("-") else 1.0
    best, best_value = None, float("-inf")
    for folder in folders:
        value = json.loads((folder / STATE).read_text())["metrics"].get(name)
        if value is not None and sign * value >= best_value:
            best, best_value = folder, sign * value
    return best


def _complete(root: Path) -> list[Path]:
    """Return the complete checkpoints, the oldest first."""
    found = (marker.parent for marker in root.glob(f"iter_*/{COMPLETE}"))
    return sorted(folder for folder in found if not folder.name.endswith(PARTIAL_SUFFIX))


def _read_state(folder: Path, expected: Collection[str]) -> dict[str, Any]:
    state = json.loads((folder / STATE).read_text())
    missing = sorted(set(expected) - set(state))
    if missing:
        raise ValueError(
            f"checkpoint {folder} has no {', '.join(missing)} in {STATE}: another version of this code wrote it "
            f"({state.get('code_version', 'unknown')}). Continue with that version, or start a new run from its weights, "
            "which 'hetero-ppo export' gives"
        )
    return state


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("iter_"))


def _manifest(partial: Path) -> dict[str, tuple[int, int]]:
    """Return file -> size and checksum: from the ranks' lists of their files, and computed for the small ones."""
    manifest: dict[str, tuple[int, int]] = {}
    for path in sorted(partial.parent.glob(share_file(partial, 0).name.replace("00000", "*"))):
        manifest |= json.loads(path.read_text())
        path.unlink()
    others = {str(path.relative_to(partial)): path for path in files_of(partial)}
    return manifest | {name: file_digest(path, fsync=True) for name, path in others.items() if name not in manifest}


def _rng_file(folder: Path, rank: int) -> Path:
    return folder / "rng" / f"rank_{rank:05d}.json"


def _describe_damage(folder: Path, fault: str) -> str:
    good = [other for other in _complete(folder.parent) if other != folder and find_size_fault(other) is None]
    if not good:
        return f"checkpoint {folder} is damaged: {fault}. There is no other complete checkpoint in this run folder"
    return (
        f"checkpoint {folder} is damaged: {fault}. The last good one is {good[-1].name}: continue from it with "
        f"checkpoint.step={_step_of(good[-1])}"
    )


def _reason(error: OSError | CheckpointException) -> str:
    """Return the system's error message; torch's exception has those of all ranks as text, with their tracebacks."""
    found = re.search(r"\[Errno \d+\] [^\n]*", str(error))
    return str(error) if found is None else found[0].strip("\"')")

"""Checkpoints of trained roles with Megatron-Core's dist_checkpointing.

``<run.dir>/checkpoints/iter_0000100/<role>/`` holds each role's weights and optimizer, ``trainer.json`` the trainer's own
state, ``rng/`` the random-number generators of every rank, ``config.yaml`` the resolved configuration. All of it is written into
``iter_0000100.tmp/``, ``COMPLETE`` (sizes and checksums of all files) last, and then renamed: a folder without ``.tmp`` has all
roles of one step. ``latest_checkpointed_iteration.txt`` names the newest.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from hetero_ppo.checkpoint.manifest import (
    COMPLETE,
    find_fault,
    find_size_fault,
    look_at_share,
    settle_folder,
    write_marker,
    write_text,
)
from hetero_ppo.checkpoint.random_state import random_state, set_random_state
from hetero_ppo.checkpoint.version import code_version
from hetero_ppo.config.schema import CheckpointConfig
from hetero_ppo.engines.train_engine import TrainEngine
from hetero_ppo.errors import RunError

LATEST = "latest_checkpointed_iteration.txt"
STATE = "trainer.json"
BEING_WRITTEN = ".tmp"


class CheckpointManager:
    """Saves and loads all trained roles and the trainer's state together."""

    def __init__(self, run_dir: Path, config: CheckpointConfig) -> None:
        """
        Args:
            run_dir: of this run, where ``config.yaml`` lies.
            config: what is kept.
        """
        self.run_dir = run_dir
        self.root = run_dir / "checkpoints"
        self.config = config
        self._version = code_version() if dist.get_rank() == 0 else ""

    def save(
        self,
        step: int,
        engines: Mapping[str, TrainEngine],
        state: Mapping[str, Any],
        metrics: Mapping[str, float],
        files: Mapping[str, str] | None = None,
    ) -> Path:
        """Write one checkpoint; a reader sees all of it or none. Collective over the world.

        Args:
            step: steps done.
            engines: trained roles by name.
            state: what the trainer needs to go on, as JSON.
            metrics: of the step; ``checkpoint.keep_best`` names one of them.
            files: name -> text of what else goes with the weights.

        Raises:
            RunError: it could not be written. What was saved before is as it was.
        """
        folder = self.root / f"iter_{step:07d}"
        beside = folder.with_name(folder.name + BEING_WRITTEN)
        try:
            self._write(beside, step, engines, {**state, "metrics": dict(metrics)}, files or {})
            if dist.get_rank() == 0:
                self._put_in_place(beside, folder, step)
        except (OSError, CheckpointException) as error:
            raise RunError(self._say_unwritable(step, error)) from error
        dist.barrier()
        return folder

    def check_room(self, engines: Mapping[str, TrainEngine]) -> None:
        """A first checkpoint fits on the disk. Collective over the world; before the first step.

        Raises:
            ValueError: it does not.
        """
        needed = torch.tensor([sum(engine.checkpoint_bytes for engine in engines.values())])
        dist.all_reduce(needed)
        if dist.get_rank() == 0:
            free = shutil.disk_usage(self.run_dir).free
            if free < int(needed):
                raise ValueError(
                    f"run.dir is {str(self.run_dir)!r}: a checkpoint takes {int(needed) / 2**30:.3g} GiB and {free / 2**30:.3g} GiB are "
                    f"free there; with checkpoint.keep={self.config.keep} there are up to {self.config.keep + 1} at a time"
                )
        dist.barrier()

    def load(self, load_dir: Path, engines: Mapping[str, TrainEngine]) -> dict[str, Any]:
        """Restore a complete checkpoint of a run folder into the engines. Collective over the world.

        Returns:
            The trainer's state, with ``step``.

        Raises:
            ValueError: there is no complete checkpoint, it is damaged, or it lacks a role.
        """
        folder = checkpoint_folder(load_dir, self.config.step)
        self._check_contents(folder)
        for role, engine in engines.items():
            if not (folder / role).is_dir():
                raise ValueError(f"checkpoint {folder} has no role {role!r}: it was written by another kind of run")
            with engine.on_device(grads=True, optimizer=True, phase="load"):
                engine.load(folder / role)
        state = json.loads((folder / STATE).read_text())
        if state["world_size"] == dist.get_world_size():
            set_random_state(json.loads(_rng_file(folder, dist.get_rank()).read_text()))
        return state

    def _write(
        self,
        folder: Path,
        step: int,
        engines: Mapping[str, TrainEngine],
        state: Mapping[str, Any],
        files: Mapping[str, str],
    ) -> None:
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            for name in (*engines, "rng"):
                (folder / name).mkdir(parents=True)
        dist.barrier()
        for role, engine in engines.items():
            engine.save(folder / role)
        _rng_file(folder, rank).write_text(json.dumps(random_state()))
        if rank == 0:
            about = {"step": step, "world_size": num_ranks, "code_version": self._version}
            (folder / STATE).write_text(json.dumps({**about, **state}, indent=1))
            for name, text in files.items():
                (folder / name).write_text(text)
            shutil.copyfile(self.run_dir / "config.yaml", folder / "config.yaml")
        dist.barrier()
        share = folder.with_name(f"{folder.name}.files_{rank:05d}")
        share.write_text(json.dumps(look_at_share(folder, rank, num_ranks, settle=True)))
        dist.barrier()
        if rank == 0:
            manifest: dict[str, tuple[int, int]] = {}
            for path in sorted(folder.parent.glob(f"{folder.name}.files_*")):
                manifest |= json.loads(path.read_text())
                path.unlink()
            write_marker(folder, manifest)

    def _put_in_place(self, beside: Path, folder: Path, step: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
        write_text(self.root / LATEST, str(step))
        settle_folder(self.root)
        self._retire(step)

    def _retire(self, step: int) -> None:
        """Keep the newest, and the best by ``checkpoint.keep_best``. Later ones are of a run that was gone back from."""
        complete = _complete(self.root)
        until_now = [folder for folder in complete if _step_of(folder) <= step]
        kept = set(until_now[-self.config.keep :])
        if self.config.keep_best is not None:
            best = best_checkpoint(until_now, self.config.keep_best)
            kept |= set() if best is None else {best}
        for folder in complete:
            if folder not in kept:
                shutil.rmtree(folder)

    def _check_contents(self, folder: Path) -> None:
        fault = find_fault(folder, dist.get_rank(), dist.get_world_size())
        worst = torch.tensor([int(fault is not None)])
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        if fault is not None:
            raise ValueError(_say_damaged(folder, fault))
        if bool(worst):
            raise ValueError(_say_damaged(folder, "another rank has found which file"))

    def _say_unwritable(self, step: int, error: BaseException) -> str:
        steps = ", ".join(str(_step_of(folder)) for folder in _complete(self.root)) or "none"
        return (
            f"the checkpoint of step {step} could not be written below {self.root}: {_reason(error)}. Make room there, or choose another "
            f"run.dir. Complete checkpoints of this run: {steps}"
        )


def checkpoint_folder(run_dir: Path, step: int | None) -> Path:
    """Folder of a complete checkpoint below a run folder.

    Args:
        run_dir: of the run that wrote it.
        step: None for the newest.

    Raises:
        ValueError: there is none, or a file of it is missing or of another size.
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
        raise ValueError(_say_damaged(folder, fault))
    return folder


def checkpoint_step(run_dir: Path, step: int | None) -> int:
    """Steps that a complete checkpoint of a run folder has behind it.

    Args:
        run_dir: of the run that wrote it.
        step: None for the newest.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    return int(json.loads((checkpoint_folder(run_dir, step) / STATE).read_text())["step"])


def best_checkpoint(folders: list[Path], metric: str) -> Path | None:
    """The checkpoint with the highest value of a metric, or with the lowest for ``-metric``; the later one of equals.

    Args:
        folders: complete checkpoints, oldest first; those whose step has no such metric take no part.
        metric: name, with a leading ``-`` where less is better.
    """
    name, sign = metric.removeprefix("-"), -1.0 if metric.startswith("-") else 1.0
    best, best_value = None, float("-inf")
    for folder in folders:
        value = json.loads((folder / STATE).read_text())["metrics"].get(name)
        if value is not None and sign * value >= best_value:
            best, best_value = folder, sign * value
    return best


def _complete(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = (marker.parent for marker in root.glob(f"iter_*/{COMPLETE}"))
    return sorted(folder for folder in found if not folder.name.endswith(BEING_WRITTEN))


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("iter_"))


def _rng_file(folder: Path, rank: int) -> Path:
    return folder / "rng" / f"rank_{rank:05d}.json"


def _say_damaged(folder: Path, fault: str) -> str:
    good = [other for other in _complete(folder.parent) if other != folder and find_size_fault(other) is None]
    if not good:
        return f"checkpoint {folder} is damaged: {fault}. There is no other complete checkpoint in this run folder"
    return (
        f"checkpoint {folder} is damaged: {fault}. The last good one is {good[-1].name}: go on from it with "
        f"checkpoint.step={_step_of(good[-1])}"
    )


def _reason(error: OSError | CheckpointException) -> str:
    """What the system said; torch's exception holds those of all ranks as text, with their tracebacks."""
    found = re.search(r"\[Errno \d+\] [^\n]*", str(error))
    return str(error) if found is None else found[0].strip("\"')")

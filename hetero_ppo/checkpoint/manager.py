"""Checkpoints of trained roles with Megatron-Core's dist_checkpointing.

``<run.dir>/checkpoints/iter_0000100/<role>/`` holds each role's weights and optimizer, ``trainer.json`` the trainer's own
state, ``COMPLETE`` says that all of it was written; ``latest_checkpointed_iteration.txt`` names the newest.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hetero_ppo.engines.train_engine import TrainEngine

LATEST = "latest_checkpointed_iteration.txt"
COMPLETE = "COMPLETE"


class CheckpointManager:
    """Saves and loads all trained roles and the trainer's state together."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.root = run_dir / "checkpoints"
        self.keep = keep

    def save(
        self,
        step: int,
        engines: Mapping[str, TrainEngine],
        state: Mapping[str, Any],
        files: Mapping[str, str] | None = None,
    ) -> Path:
        """Write one checkpoint; a reader sees all of it or none. Collective over the world.

        Args:
            step: steps done.
            engines: trained roles by name.
            state: what the trainer needs to go on, as JSON.
            files: name -> text of what else goes with the weights.
        """
        folder = self.root / f"iter_{step:07d}"
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            for role in engines:
                (folder / role).mkdir(parents=True)
        dist.barrier()
        for role, engine in engines.items():
            engine.save(folder / role)
        if dist.get_rank() == 0:
            _write(folder / "trainer.json", json.dumps({"step": step, **state}, indent=1))
            for name, text in (files or {}).items():
                _write(folder / name, text)
            _write(folder / COMPLETE, "")
            _write(self.root / LATEST, str(step))
            self._retire()
        dist.barrier()
        return folder

    def load(self, load_dir: Path, engines: Mapping[str, TrainEngine]) -> dict[str, Any]:
        """Restore the newest complete checkpoint of a run folder into the engines. Collective over the world.

        Returns:
            The trainer's state, with ``step``.

        Raises:
            ValueError: there is no complete checkpoint, or it lacks a role.
        """
        folder = checkpoint_folder(load_dir, None)
        for role, engine in engines.items():
            if not (folder / role).is_dir():
                raise ValueError(f"checkpoint {folder} has no role {role!r}: it was written by another kind of run")
            with engine.on_device(grads=True, optimizer=True, phase="load"):
                engine.load(folder / role)
        return json.loads((folder / "trainer.json").read_text())

    def _retire(self) -> None:
        if self.keep <= 0:
            return
        for old in sorted(self.root.glob("iter_*"))[: -self.keep]:
            shutil.rmtree(old)


def checkpoint_folder(run_dir: Path, step: int | None) -> Path:
    """Folder of a complete checkpoint below a run folder.

    Args:
        run_dir: of the run that wrote it.
        step: None for the newest.

    Raises:
        ValueError: there is none.
    """
    root = run_dir / "checkpoints"
    complete = sorted(marker.parent for marker in root.glob(f"iter_*/{COMPLETE}"))
    if not complete:
        raise ValueError(f"{run_dir}: no complete checkpoint below {root}")
    if step is None:
        return complete[-1]
    folder = root / f"iter_{step:07d}"
    if folder not in complete:
        steps = ", ".join(str(int(path.name.removeprefix("iter_"))) for path in complete)
        raise ValueError(f"{run_dir}: no complete checkpoint of step {step}; there are: {steps}")
    return folder


def checkpoint_step(run_dir: Path) -> int:
    """Steps that the newest complete checkpoint of a run folder has behind it.

    Raises:
        ValueError: there is none.
    """
    return int(json.loads((checkpoint_folder(run_dir, None) / "trainer.json").read_text())["step"])


def _write(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)

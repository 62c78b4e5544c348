"""The faults of ``benchmarks/faults.py``: where they happen, and how the run has to end."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetero_ppo.errors import EXIT_STOPPED, EXIT_STUCK

#: Of every run that meets no fault, with a checkpoint after each.
STEPS = 4
#: In the output of a run, before the seconds since the epoch at which its fault happened.
HAPPENED = "the fault happens at "
PHASES = (
    *("rollout", "experience", "scores", "ref_log_probs", "old_log_probs", "values", "advantages"),
    *("train_critic", "train_actor", "weight_sync", "checkpoint"),
)
SAVING = {
    "between the roles' copies": ("call:hetero_ppo.engines.train_engine:TrainEngine.save", "critic"),
    "in the writing thread": ("call:hetero_ppo.engines.role_snapshot:RoleSnapshot.write", None),
    "before the marker": ("call:hetero_ppo.checkpoint.manager:write_marker", None),
    "before the rename": ("call:hetero_ppo.checkpoint.manager:CheckpointManager._put_in_place", None),
    "before old ones go": ("call:hetero_ppo.checkpoint.manager:CheckpointManager._retire", None),
}


@dataclass(frozen=True)
class Case:
    """One fault. Exactly one of ``point``, ``signals``, ``damage`` and ``disk`` says what kind it is."""

    name: str
    status: int  # with which the run ends
    point: dict[str, Any] | None = None  # of faults_worker.py
    signals: tuple[int, ...] = ()  # to the launcher, or to the first rank, after the first step
    to_rank: bool = False
    damage: Callable[[Path], None] | None = None  # of the newest checkpoint of a finished part
    disk: str | None = None  # "full", "small", "limit" (of a file's size) or "read-only"
    num_ranks: int = 1
    overrides: tuple[str, ...] = ()
    resumed: tuple[str, ...] = ()  # overrides of the run that goes on
    message: str = ""  # in the output, in any case


def cases() -> list[Case]:
    """All of them, in the order in which they run."""
    killed = 128 + signal.SIGKILL
    found = [
        Case(f"kill in {phase}", killed, point={"point": f"phase:{phase}", "logged": 2 if phase == "checkpoint" else 1})
        for phase in PHASES
    ]
    for role in ("critic", "actor"):
        point = "call:hetero_ppo.engines.train_engine:TrainEngine._optimizer_step"
        found.append(Case(f"kill in the {role}'s optimizer step", killed, point={"point": point, "logged": 1, "role": role}))
    for name, (point, role) in SAVING.items():
        found.append(Case(f"kill while saving, {name}", killed, point={"point": point, "logged": 2, "role": role}))
    def in_flight(phase: str) -> dict[str, Any]:
        return {"point": f"phase:{phase}", "logged": 2, "held": True}

    export = {"point": "call:hetero_ppo.engines.train_engine:TrainEngine.export", "logged": STEPS}
    exporting = ("checkpoint.export_hf=true",)
    two = {"point": "phase:train_actor", "logged": 1, "rank": 1}
    found += [
        Case("kill before any checkpoint", killed, point={"point": "phase:train_actor", "logged": 0}),
        *(Case(f"kill in {phase}, a save in flight", killed, point=in_flight(phase)) for phase in ("rollout", "train_actor")),
        Case("kill in the export", killed, point=export, overrides=exporting, resumed=exporting),
        Case("kill rank 1 of 2 in train_actor", killed, point=two, num_ranks=2),
        Case("kill rank 1 of 2, a save in flight", killed, point={**in_flight("train_actor"), "rank": 1}, num_ranks=2),
        Case("kill rank 1 of 2 while saving", killed, point={**two, "point": "phase:checkpoint", "logged": 2}, num_ranks=2),
        Case(
            "hang in values",
            EXIT_STUCK,
            point={"point": "phase:values", "logged": 1, "what": "hang"},
            overrides=("run.phase_timeout_minutes=0.05",),
            message="is stuck in phase",
        ),
        Case("SIGTERM", EXIT_STOPPED, signals=(signal.SIGTERM,), message="stopped on request after step"),
        Case("SIGUSR1", EXIT_STOPPED, signals=(signal.SIGUSR1,), message="stopped on request after step"),
        Case("SIGTERM to a rank of 2", EXIT_STOPPED, signals=(signal.SIGTERM,), to_rank=True, num_ranks=2),
        Case("SIGKILL to a rank", killed, signals=(signal.SIGKILL,), to_rank=True),
        Case("SIGINT", 128 + signal.SIGINT, signals=(signal.SIGINT,)),
        Case("SIGKILL to the launcher", -signal.SIGKILL, signals=(signal.SIGKILL,)),
    ]
    damages = (truncate_weights, flip_a_bit, lose_a_file, cut_the_state, cut_the_marker)
    found += [Case(f"checkpoint: {d.__name__.replace('_', ' ')}", 2, damage=d, message="is damaged") for d in damages]
    found += [
        Case("checkpoint: half-written one beside it", 0, damage=leave_half_a_checkpoint),
        Case("checkpoint: marker lost", 0, damage=lose_the_marker),
        Case("disk full while saving", 1, disk="full", message="could not be written below"),
        Case("disk too small for a checkpoint", 2, disk="small", message="a checkpoint takes"),
        Case("file-size limit while saving", 1, disk="limit", message="could not be written below"),
        Case("read-only run folder", 2, disk="read-only", message="cannot write there"),
    ]
    return found


def weights_of(folder: Path) -> Path:
    return max((folder / "actor").glob("*.distcp"), key=lambda path: path.stat().st_size)


def truncate_weights(folder: Path) -> None:
    path = weights_of(folder)
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(folder: Path) -> None:
    path = weights_of(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lose_a_file(folder: Path) -> None:
    weights_of(folder).unlink()


def cut_the_state(folder: Path) -> None:
    os.truncate(folder / "trainer.json", 10)


def cut_the_marker(folder: Path) -> None:
    os.truncate(folder / "COMPLETE", 10)


def lose_the_marker(folder: Path) -> None:
    (folder / "COMPLETE").unlink()


def leave_half_a_checkpoint(folder: Path) -> None:
    half = folder.with_name("iter_0000009.tmp")
    shutil.copytree(folder, half)
    truncate_weights(half)

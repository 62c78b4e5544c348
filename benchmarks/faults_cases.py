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

#: Number of steps of a run without a fault, which has a checkpoint after each.
STEPS = 4
#: Text in the output of a run before the seconds since the epoch at which its fault happened.
HAPPENED = "the fault happens at "
KILLED = 128 + signal.SIGKILL
PHASES = (
    *("rollout", "experience", "scores", "ref_log_probs", "old_log_probs", "values", "advantages"),
    *("train_critic", "train_actor", "weight_sync", "checkpoint"),
)
#: Phases that take long enough for a kill in the middle of them.
LONG_PHASES = ("rollout", "experience", "train_critic", "train_actor", "weight_sync", "checkpoint")
SAVING = {
    "between the roles' copies": ("call:hetero_ppo.engines.train_engine:TrainEngine.save", "critic"),
    "in the writing thread": ("call:hetero_ppo.engines.role_snapshot:RoleSnapshot.write", None),
    "before the marker": ("call:hetero_ppo.checkpoint.manager:write_marker", None),
    "before the rename": ("call:hetero_ppo.checkpoint.manager:CheckpointManager._put_in_place", None),
    "before old ones go": ("call:hetero_ppo.checkpoint.manager:CheckpointManager._retire", None),
}
#: File of a run -> (pattern of its path, number of steps that are logged before the write).
WRITES = {
    "weights": ("*/iter_*/actor/*.distcp", 2),
    "trainer.json": ("*/iter_*/trainer.json", 2),
    "the random state": ("*/iter_*/rng/*", 2),
    "the marker": ("*/COMPLETE*", 2),
    "the pointer to the newest": ("*/latest_checkpointed_iteration*", 2),
    "metrics.jsonl": ("*/metrics.jsonl", 1),
    "the rollouts of a step": ("*/rollouts/step_*", 1),
}
SYNC = "call:hetero_ppo.rollout.servers.pool:swap"
FROZEN = ("run.heartbeat_timeout_s=5",)
NO_SIGN = "has given no sign of life for"
FUNCTION = (
    "reward.source=function",
    f"reward.function={Path(__file__).with_name('faults_reward.py')}:score",
    "reward_model=null",
)
CONSTANT = ("actor.optimizer.lr_schedule=constant",)


@dataclass(frozen=True)
class Blow:
    """A signal from outside."""

    number: int
    to: str = "launcher"  # "launcher", "rank" (the first) or "all"
    after_s: float = 0.0  # since the blow before it; of the first since the first step was logged
    at_random: bool = False  # at a seeded time of the run instead

    def __post_init__(self) -> None:
        assert self.to in ("launcher", "rank", "all")


@dataclass(frozen=True)
class Case:
    """One fault. Exactly one of ``point``, ``blows``, ``damage``, ``disk``, ``folder`` and ``flag`` is set, which is its kind."""

    name: str
    status: int  # expected exit status of the run; 0: it survives by itself
    point: dict[str, Any] | None = None  # fields of faults_worker.Fault
    inside: str = ""  # phase in which the point's fault happens, at a seeded time
    blows: tuple[Blow, ...] = ()
    damage: Callable[[Path], None] | None = None  # change of the newest checkpoint of a finished part
    disk: str | None = None  # "full", "small", "limit" (of a file's size) or "read-only"
    folder: str | None = None  # "used": a fresh run in it; "two": a second run while the first one is in it
    flag: bool = False  # the reward function fails once
    engine: str = "megatron"  # or "vllm"
    num_ranks: int = 1
    setup: tuple[str, ...] = ()  # overrides of all its runs, and of the run without a fault
    overrides: tuple[str, ...] = ()  # overrides of the run that meets the fault
    resumed: tuple[str, ...] = ()  # overrides of the resumed run
    message: str = ""  # text that the output must contain
    start: str = ""  # how the launcher is started: "", "nohup", or "terminal" (a terminal that the fault closes)

    @property
    def kind(self) -> str:
        """Name of the field that is set."""
        names = ("point", "blows", "damage", "disk", "folder", "flag")
        (found,) = [name for name in names if vars(self)[name]]
        return found


def cases() -> list[Case]:
    """Return all cases, in the order in which they run."""
    return [
        *killed_in_phases(),
        *killed_while_saving(),
        *killed_in_a_write(),
        *killed_ranks(),
        *killed_at_random(),
        *frozen(),
        *signalled(),
        *damaged(),
        *disks_and_folders(),
        *server_faults(),
        *runs_with_servers(),
    ]


def kill_in(phase: str, logged: int) -> dict[str, Any]:
    """Return a kill at the start of a phase, after ``logged`` logged steps."""
    return {"point": f"phase:{phase}", "logged": logged, "what": "kill"}


def killed_in_phases() -> list[Case]:
    """Return the kills at the start of every phase, inside the long ones, and in the optimizers' steps."""
    logged = {"checkpoint": 2}
    found = [Case(f"kill in {phase}", KILLED, point=kill_in(phase, logged.get(phase, 1))) for phase in PHASES]
    found += [
        Case(f"kill in the middle of {phase}", KILLED, point=kill_in(phase, logged.get(phase, 1)), inside=phase)
        for phase in LONG_PHASES
    ]
    for role in ("critic", "actor"):
        point = {
            "point": "call:hetero_ppo.engines.train_engine:TrainEngine._optimizer_step",
            "logged": 1,
            "role": role,
            "what": "kill",
        }
        found.append(Case(f"kill in the {role}'s optimizer step", KILLED, point=point))
    found.append(Case("kill before any checkpoint", KILLED, point=kill_in("train_actor", 0)))
    return found


def killed_while_saving() -> list[Case]:
    """Return the kills in the steps of a save, while a save is in flight, and in the export."""
    found = [
        Case(f"kill while saving, {name}", KILLED, point={"point": point, "logged": 2, "role": role, "what": "kill"})
        for name, (point, role) in SAVING.items()
    ]
    export = {"point": "call:hetero_ppo.engines.model_engine:ModelEngine.export", "logged": STEPS, "what": "kill"}
    exporting = ("checkpoint.export_hf=true",)
    return [
        *found,
        *(
            Case(f"kill in {phase}, a save in flight", KILLED, point={**kill_in(phase, 2), "held": True})
            for phase in ("rollout", "train_actor")
        ),
        Case("kill in the export", KILLED, point=export, overrides=exporting, resumed=exporting),
    ]


def killed_in_a_write() -> list[Case]:
    """Return the cases that kill a run within a file's write, which leaves half of the file."""
    return [
        Case(
            f"kill in a write of {name}", KILLED, point={"point": f"write:{pattern}", "logged": logged, "what": "kill"}
        )
        for name, (pattern, logged) in WRITES.items()
    ]


def killed_ranks() -> list[Case]:
    """Return the kills of one rank of two."""
    two = {**kill_in("train_actor", 1), "rank": 1}
    return [
        Case("kill rank 1 of 2 in train_actor", KILLED, point=two, num_ranks=2),
        Case("kill rank 1 of 2, a save in flight", KILLED, point={**two, "logged": 2, "held": True}, num_ranks=2),
        Case(
            "kill rank 1 of 2 while saving",
            KILLED,
            point={**two, "point": "phase:checkpoint", "logged": 2},
            num_ranks=2,
        ),
    ]


def killed_at_random() -> list[Case]:
    """Return the kills of all processes of a run at once, at a seeded time between its start and its end."""
    everything = (Blow(signal.SIGKILL, "all", at_random=True),)
    found = [Case(f"kill everything at once, time {n}", -signal.SIGKILL, blows=everything) for n in range(1, 5)]
    found += [
        Case(f"kill everything of 2 ranks at once, time {n}", -signal.SIGKILL, blows=everything, num_ranks=2)
        for n in (1, 2)
    ]
    return found + [
        Case(f"vllm: kill everything at once, time {n}", -signal.SIGKILL, blows=everything, engine="vllm")
        for n in (1, 2, 3)
    ]


def frozen() -> list[Case]:
    """Return the cases of stopped and frozen processes. The launcher and the job survive when they are continued."""

    def suspended(to: str) -> tuple[Blow, ...]:
        return (Blow(signal.SIGSTOP, to), Blow(signal.SIGCONT, to, after_s=8.0))

    stop = {"point": "phase:values", "logged": 1, "what": "stop"}
    return [
        Case("SIGSTOP of a rank", EXIT_STUCK, point=stop, overrides=FROZEN, message=NO_SIGN),
        Case(
            "SIGSTOP of rank 1 of 2",
            EXIT_STUCK,
            point={**stop, "rank": 1},
            overrides=FROZEN,
            message=NO_SIGN,
            num_ranks=2,
        ),
        Case(
            "a rank's GIL is held for good",
            EXIT_STUCK,
            point={**stop, "what": "hold the gil"},
            overrides=FROZEN,
            message=NO_SIGN,
        ),
        Case("SIGSTOP of the launcher, continued", 0, blows=suspended("launcher"), overrides=FROZEN),
        Case("SIGSTOP of everything, continued", 0, blows=suspended("all"), overrides=FROZEN),
        Case("SIGSTOP of everything of 2 ranks, continued", 0, blows=suspended("all"), overrides=FROZEN, num_ranks=2),
        Case(
            "hang in values",
            EXIT_STUCK,
            point={**stop, "what": "hang"},
            overrides=("run.phase_timeout_minutes=0.05",),
            message="is stuck in phase",
        ),
        Case(
            "a reward function holds the GIL for good", 1, flag=True, setup=FUNCTION, overrides=("reward.timeout_s=3",)
        ),
    ]


def signalled() -> list[Case]:
    """Return the cases of signals after the first step."""

    def one(number: int, to: str = "launcher") -> tuple[Blow, ...]:
        return (Blow(number, to),)

    stopped = "stopped on request after step"
    return [
        Case("SIGTERM", EXIT_STOPPED, blows=one(signal.SIGTERM), message=stopped),
        Case("SIGUSR1", EXIT_STOPPED, blows=one(signal.SIGUSR1), message=stopped),
        Case("SIGHUP", EXIT_STOPPED, blows=one(signal.SIGHUP), message=stopped),
        Case("SIGHUP, started with nohup", 0, blows=one(signal.SIGHUP), start="nohup"),
        Case("the terminal is closed", EXIT_STOPPED, blows=one(signal.SIGHUP), start="terminal"),
        Case("SIGTERM to a rank of 2", EXIT_STOPPED, blows=one(signal.SIGTERM, "rank"), num_ranks=2),
        Case("SIGKILL to a rank", KILLED, blows=one(signal.SIGKILL, "rank")),
        Case("SIGINT", 128 + signal.SIGINT, blows=one(signal.SIGINT)),
        Case("SIGKILL to the launcher", -signal.SIGKILL, blows=one(signal.SIGKILL)),
    ]


def damaged() -> list[Case]:
    """Return the cases of altered checkpoints."""
    damages = (truncate_weights, flip_a_bit, lose_a_file, cut_the_state, cut_the_marker)
    found = [
        Case(f"checkpoint: {d.__name__.replace('_', ' ')}", 2, damage=d, setup=CONSTANT, message="is damaged")
        for d in damages
    ]
    return [
        *found,
        Case("checkpoint: another one is half written", 0, damage=leave_half_a_checkpoint, setup=CONSTANT),
        Case("checkpoint: marker lost", 0, damage=lose_the_marker, setup=CONSTANT),
    ]


def disks_and_folders() -> list[Case]:
    """Return the cases of disks that fail and of folders that are used already."""
    return [
        Case("disk full while saving", 1, disk="full", message="could not be written below"),
        Case("disk too small for a checkpoint", 2, disk="small", message="a checkpoint takes"),
        Case("file-size limit while saving", 1, disk="limit", message="could not be written below"),
        Case("read-only run folder", 2, disk="read-only", message="cannot write there"),
        Case("a fresh run in a used folder", 2, folder="used", setup=CONSTANT, message="run.overwrite"),
        Case("two runs in one folder", 2, folder="two", message="a run is working there"),
    ]


def server_faults() -> list[Case]:
    """Return the kills and stops of a vLLM server's processes, in the rollout and in the weight sync. The run survives them."""
    found = []
    for where, point, after_s in (("a rollout", "phase:rollout", 0.1), ("a weight sync", SYNC, 0.0)):
        for what, verb in (("kill", "killed"), ("stop", "stopped")):
            for name in ("api server", "engine core", "guardian"):
                fault = {"point": point, "logged": 1, "what": what, "to": name, "after_s": after_s}
                # A server whose guardian is stopped still answers, so the run may end before the guardian has been silent for long enough.
                message = "" if (name, verb, where) == ("guardian", "stopped", "a weight sync") else "restart 1 of 2"
                found.append(Case(f"vllm: {name} {verb} in {where}", 0, point=fault, engine="vllm", message=message))
    return found


def runs_with_servers() -> list[Case]:
    """Return the cases of runs with vLLM servers."""
    rollout = {"point": "phase:rollout", "logged": 1, "what": "kill", "after_s": 0.1}
    return [
        Case("vllm: kill in a rollout", KILLED, point=rollout, engine="vllm"),
        Case("vllm: kill in a weight sync", KILLED, point={**rollout, "point": SYNC, "after_s": 0.0}, engine="vllm"),
        Case(
            "vllm: kill in a write of weights for the servers",
            KILLED,
            point={"point": "write:*/weights_*/shard_*", "logged": 1, "what": "kill"},
            engine="vllm",
        ),
        Case(
            "vllm: kill in a write of the bank",
            KILLED,
            point={"point": "write:*/bank/*", "logged": 1, "what": "kill"},
            engine="vllm",
        ),
        Case(
            "vllm: SIGSTOP of a rank",
            EXIT_STUCK,
            point={**rollout, "what": "stop"},
            overrides=FROZEN,
            message=NO_SIGN,
            engine="vllm",
        ),
        Case(
            "vllm: SIGTERM",
            EXIT_STOPPED,
            blows=(Blow(signal.SIGTERM),),
            message="stopped on request after step",
            engine="vllm",
        ),
    ]


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

"""Claim the folder of a run.

A run that continues in its own folder (``checkpoint.load`` names ``run.dir``) finds its files there. Every other run needs a folder without
results. If an earlier run has left files, this happens:

=========================================================  =====================================================
the earlier run left                                       this run
=========================================================  =====================================================
checkpoints, an export, metrics, rollouts or a bank        is refused, or with ``run.overwrite`` removes them all
the same, but no checkpoint and no export, and had the     begins again, as a run that continues from step 0
same configuration                                         would; the earlier files are moved to ``ended_<n>``
only its configuration and logs                            replaces them
=========================================================  =====================================================
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import yaml

from hetero_ppo.checkpoint.manager import complete_checkpoints
from hetero_ppo.config.load import LoadedConfig
from hetero_ppo.config.on_resume import leaves
from hetero_ppo.config.schema import SCHEMAS
from hetero_ppo.config.schema.option import OnResume
from hetero_ppo.observability.sinks.jsonl import METRICS_FILE
from hetero_ppo.observability.sinks.weights_and_biases import WANDB_FILE
from hetero_ppo.observability.records import CONFIG_FILE
from hetero_ppo.runtime.changes import compare, config_values
from hetero_ppo.runtime.folder_lock import FolderLock, find_holder

#: Results: files that a run cannot make again without training.
RESULTS = ("checkpoints", METRICS_FILE, "rollouts", "bank", "hf")
#: Patterns of the other files that a run writes. The batch scripts write FINISHED when a run has finished. The configuration is removed
#: last: if a run is killed while it clears the folder, the configuration still shows whose files they are.
OTHERS = (
    *(
        "eval_before.json",
        "eval_after.json",
        "memory_ledger.json",
        "report.html",
        "FINISHED",
        "trace",
        "tensorboard",
        "wandb",
        WANDB_FILE,
        "rollout",
    ),
    "chat_template.jinja",
    *("stacks_rank*.txt", ".hf.partial", ".hf.old", CONFIG_FILE),
)


class Start(Enum):
    """Ways in which a run begins in its folder."""

    new = "there is nothing of an earlier run"
    goes_on = "the folder is that of the checkpoint"
    again = "the same run ended here before its first checkpoint"
    overwrites = "run.overwrite"


@dataclass(frozen=True)
class Results:
    """Results of an earlier run in a folder."""

    steps: list[int]  # steps of complete checkpoints
    is_exported: bool
    num_logged: int  # lines of metrics.jsonl
    num_rollouts: int  # files of rollouts
    num_banked: int  # files of the bank

    def __bool__(self) -> bool:
        return bool(self.steps or self.is_exported or self.num_logged or self.num_rollouts or self.num_banked)

    @property
    def is_saved(self) -> bool:
        """True when the earlier run saved weights."""
        return bool(self.steps) or self.is_exported

    def describe(self) -> str:
        """List the results in words."""
        steps = ", ".join(map(str, self.steps))
        parts = [f"checkpoints of the steps {steps}"] if self.steps else []
        parts += ["an export (hf)"] if self.is_exported else []
        parts += [f"{METRICS_FILE} ({self.num_logged} lines)"] if self.num_logged else []
        parts += [f"rollouts of {self.num_rollouts} steps"] if self.num_rollouts else []
        parts += ["a bank of responses"] if self.num_banked else []
        return ", ".join(parts)


def find_results(folder: Path) -> Results:
    """Return the results of an earlier run in a run folder, which need not exist."""
    metrics, exported = folder / METRICS_FILE, folder / "hf"
    return Results(
        list(complete_checkpoints(folder)),
        exported.is_dir() and any(exported.iterdir()),
        len(metrics.read_bytes().splitlines()) if metrics.is_file() else 0,
        len(list((folder / "rollouts").glob("step_*.jsonl"))),
        len(list((folder / "bank").glob("step_*.jsonl"))),
    )


def choose_start(loaded: LoadedConfig) -> Start:
    """Return how a run begins in its folder. Nothing is changed.

    Raises:
        ValueError: The folder holds results of another run, or would lose files that this run reads.
    """
    folder = Path(loaded.config.run.dir)
    load = loaded.config.checkpoint.load
    if load is not None and is_same_folder(load, folder):
        return Start.goes_on
    results = find_results(folder)
    if not results:
        return Start.new
    if loaded.config.run.overwrite:
        start = Start.overwrites
    elif not results.is_saved and _is_same_run(loaded, folder / CONFIG_FILE):
        start = Start.again
    else:
        raise ValueError(_describe_refusal(folder, results))
    _check_reads_nothing(loaded, folder, start)
    return start


def check_folder(loaded: LoadedConfig) -> Start:
    """Return how a run begins in its folder, after checking that no run is working there now.

    Raises:
        ValueError: A run is working there, the folder holds results of another run, or would lose files that this run reads.
    """
    holder = find_holder(Path(loaded.config.run.dir))
    if holder is not None:
        raise ValueError(holder)
    return choose_start(loaded)


@contextlib.contextmanager
def claimed_folder(loaded: LoadedConfig) -> Iterator[list[str]]:
    """Hold the lock of the run folder for this process, and prepare the folder for the run. Call it on one rank.

    Yields:
        Messages for the user about what was done.

    Raises:
        ValueError: A run is working there, the folder is refused (``choose_start``), or it cannot be written.
    """
    folder = Path(loaded.config.run.dir)
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(FolderLock(folder))
            messages = [] if lock.note is None else [lock.note]
            messages += prepare(loaded)
        except OSError as error:
            raise ValueError(f"run.dir is {str(folder)!r}: cannot write there ({error.strerror})") from error
        yield messages


def prepare(loaded: LoadedConfig) -> list[str]:
    """Prepare a folder whose lock this process holds. Return messages about what was done."""
    folder = Path(loaded.config.run.dir)
    start, results = choose_start(loaded), find_results(folder)
    if start is Start.goes_on:
        return []
    if start is Start.again and results.num_logged:
        target = _set_aside(folder)
        text = (
            f"run.dir is {str(folder)!r}: the same run ended there before its first checkpoint ({results.describe()})"
        )
        return [f"{text}. It begins again, and the earlier files are in {target}"]
    removed = _remove(folder) if start in (Start.overwrites, Start.again) or (folder / CONFIG_FILE).is_file() else []
    if start is Start.overwrites:
        return [f"run.overwrite: removed from {folder}: {', '.join(removed)} ({results.describe()})"]
    return []


def is_same_folder(one: str | Path, other: str | Path) -> bool:
    """Return whether two paths name the same folder."""
    return Path(one).resolve() == Path(other).resolve()


def _is_same_run(loaded: LoadedConfig, config_file: Path) -> bool:
    try:
        saved = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return False
    if not isinstance(saved, dict) or saved.get("kind") != loaded.kind:
        return False
    harmless = (OnResume.operation, OnResume.newer)
    return all(change.rule in harmless for change in compare(saved, config_values(loaded), loaded.kind))


def _describe_refusal(folder: Path, results: Results) -> str:
    ways = ["choose another run.dir", "remove these files with run.overwrite=true"]
    if results.steps:
        ways.insert(0, f"continue that run: checkpoint.load={folder}")
    return (
        f"run.dir is {str(folder)!r}, which holds results of another run: {results.describe()}. This run would mix its files with them: "
        f"{', or '.join(ways)}"
    )


def _check_reads_nothing(loaded: LoadedConfig, folder: Path, start: Start) -> None:
    """Raise ValueError when the run reads a file that it would remove."""
    gone = [path.resolve() for path in _written(folder)]
    config = SCHEMAS[loaded.kind]
    for field, value in leaves(config_values(loaded), config):
        if field == "run.dir" or not isinstance(value, str):
            continue
        path = Path(value if os.path.exists(value) else value.rpartition(":")[0])
        if path != Path() and path.exists() and any(path.resolve().is_relative_to(one) for one in gone):
            what = "run.overwrite would remove" if start is Start.overwrites else "a run that begins again would move"
            raise ValueError(
                f"{field}={value}: {what} it with the earlier files of run.dir={folder}; choose another run.dir"
            )


def _written(folder: Path) -> list[Path]:
    """Return the files and folders that a run wrote, results first."""
    names = [folder / name for name in RESULTS]
    return [path for path in names if os.path.lexists(path)] + [
        path for pattern in OTHERS for path in sorted(folder.glob(pattern))
    ]


def _remove(folder: Path) -> list[str]:
    removed = _written(folder)
    for path in removed:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return [path.name for path in removed]


def _set_aside(folder: Path) -> Path:
    """Move the files of an unsaved run into a new folder. Half-written checkpoints are useless and removed."""
    number = 1
    while (folder / f"ended_{number}").exists():
        number += 1
    target = folder / f"ended_{number}"
    target.mkdir()
    if (folder / "checkpoints").is_dir():
        shutil.rmtree(folder / "checkpoints")
    for path in _written(folder):
        path.rename(target / path.name)
    return target

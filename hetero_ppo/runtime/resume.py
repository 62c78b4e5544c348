"""Read the checkpoint that a run continues from, and compare the run's configuration with it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from hetero_ppo.checkpoint.manager import UNNAMED, checkpoint_folder, complete_checkpoints, read_state, run_id_of
from hetero_ppo.config.load import LoadedConfig
from hetero_ppo.config.on_resume import is_named
from hetero_ppo.config.schema.option import OnResume
from hetero_ppo.observability.records import CONFIG_FILE
from hetero_ppo.runtime.changes import ConfigChange, compare, config_values

#: Version of the digests of inputs. Digests of another version are not compared; raise it with every change of what a digest covers.
DIGESTS_VERSION = 1


@dataclass(frozen=True)
class Resume:
    """The checkpoint that a run continues from."""

    folder: Path
    step: int
    run_id: str  # id of the run that wrote it
    is_own_folder: bool  # True: it lies in the folder of this run
    started_at: datetime | None  # start of that run, local time; None: its version did not store it
    #: Input -> digest; None: its version did not store them, or made them differently.
    inputs: dict[str, str] | None
    changes: list[ConfigChange] = field(default_factory=list)  # fields whose values differ from the checkpoint's
    allowed: list[str] = field(default_factory=list)  # checkpoint.allow_changes
    note: str | None = None  # reason why the configurations cannot be compared, for the user
    #: Role whose ``aligned`` was null -> the value that the run chose; empty in older checkpoints.
    aligned: dict[str, bool] = field(default_factory=dict)

    def has_changed(self, name: str) -> bool:
        """Return whether a field's value differs from the checkpoint's."""
        return any(change.field == name for change in self.changes)

    def describe(self) -> str:
        """Return every difference, one per line."""
        if self.note is not None:
            return self.note
        if not self.changes:
            return f"the configuration is that of {self.folder}"
        lines = [f"  {change.describe()}" for change in self.changes]
        return "\n".join([f"the configuration differs from that of {self.folder}:", *lines])


@dataclass(frozen=True)
class Beginning:
    """Identity and start of a run."""

    run_id: str
    started_at: datetime  # local time


def read_resume(loaded: LoadedConfig) -> Resume | None:
    """Read the checkpoint that a run continues from; None for a new run. Nothing is changed.

    Raises:
        ValueError: There is no such checkpoint; the configuration has a change that is not allowed; or checkpoints of another run would be
            taken for newer ones of this run.
    """
    config = loaded.config
    if config.checkpoint.load is None:
        return None
    load_dir, own = Path(config.checkpoint.load), Path(config.run.dir)
    folder = checkpoint_folder(load_dir, config.checkpoint.step)
    state = read_state(folder)
    is_own = load_dir.resolve() == own.resolve()
    started_at = state.get("begun")
    saved, note = saved_config(folder, load_dir)
    if saved is not None:
        _check_kind(saved, loaded, folder)
    found = Resume(
        folder=folder,
        step=int(state["step"]),
        run_id=str(state.get("run_id", UNNAMED)),
        is_own_folder=is_own,
        started_at=None if started_at is None else datetime.fromisoformat(started_at).replace(tzinfo=None),
        inputs=state["inputs"] if state.get("digests_version") == DIGESTS_VERSION else None,
        aligned=state.get("aligned", {}),
        changes=[] if saved is None else compare(saved, config_values(loaded), loaded.kind),
        allowed=list(config.checkpoint.allow_changes),
        note=note,
    )
    check_changes(found)
    if is_own:
        _check_later_ones(found, own)
    return found


def beginning(resume: Resume | None) -> Beginning:
    """Return the run's identity: the checkpoint's run if it continues in its folder, otherwise a new one.

    A run keeps the start date of the first run in its chain of checkpoints, because a chat template may print it.
    """
    now = datetime.now().replace(microsecond=0)
    if resume is None:
        return Beginning(uuid.uuid4().hex, now)
    run_id = resume.run_id if resume.is_own_folder else uuid.uuid4().hex
    return Beginning(run_id, resume.started_at or now)


def check_changes(resume: Resume) -> None:
    """Check that a checkpoint can take every change, and that ``checkpoint.allow_changes`` names those that must be named.

    Raises:
        ValueError: A change is refused; the message names every such field with both values.
    """
    form = [change for change in resume.changes if change.rule is OnResume.form]
    if form:
        raise ValueError(
            f"checkpoint.load: {resume.folder} is stored in another form than this run reads: {_list(form)}. Set "
            f"{', '.join(f'{change.field}={change.old}' for change in form)}"
        )
    refused = [
        change
        for change in resume.changes
        if change.rule is OnResume.objective and not is_named(change.field, resume.allowed)
    ]
    if refused:
        names = ",".join(change.field for change in refused)
        raise ValueError(
            f"checkpoint.load: this run has another objective than {resume.folder}: {_list(refused)}. Set the old values, or, if "
            f"the change is intended, checkpoint.allow_changes=[{names}]"
        )


def _list(changes: list[ConfigChange]) -> str:
    return "; ".join(change.values() for change in changes)


def saved_config(folder: Path, run_dir: Path) -> tuple[dict[str, Any] | None, str | None]:
    """Return (values of the checkpoint's configuration, None), or (None, why there are none)."""
    for path in (folder / CONFIG_FILE, run_dir / CONFIG_FILE):
        if not path.is_file():
            continue
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            values = None
        if isinstance(values, dict) and "kind" in values:
            return values, None
    return None, (
        f"{folder} has no readable {CONFIG_FILE}, and neither has {run_dir}: this run's configuration cannot be compared with the "
        "checkpoint's"
    )


def _check_kind(saved: dict[str, Any], loaded: LoadedConfig, folder: Path) -> None:
    if saved["kind"] != loaded.kind:
        raise ValueError(
            f"checkpoint.load: {folder} is of a run of kind {saved['kind']!r}, this one is of kind {loaded.kind!r}; to train further from "
            "its weights, give its export (hf) as a model.path"
        )


def _check_later_ones(resume: Resume, run_dir: Path) -> None:
    """Raise ValueError when the folder has later checkpoints of another run: they would be taken for newer ones of this run."""
    foreign = [
        folder
        for step, folder in complete_checkpoints(run_dir).items()
        if step > resume.step and run_id_of(folder) not in (resume.run_id, None)
    ]
    if foreign:
        names = ", ".join(folder.name for folder in foreign)
        raise ValueError(
            f"checkpoint.load: {run_dir / 'checkpoints'} has later checkpoints of another run than {resume.folder.name}: {names}. "
            "Move them elsewhere, or continue in a new folder (run.dir)"
        )

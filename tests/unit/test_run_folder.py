"""Folders that a run may begin in, files that it removes or keeps there, and the one run that may use a folder at a time."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hetero_ppo.config.load import LoadedConfig, load_config
from hetero_ppo.config.render import save_config
from hetero_ppo.runtime import folder_lock
from hetero_ppo.runtime.folder_lock import LOCK_FILE, FolderLock, find_holder
from hetero_ppo.runtime.run_folder import Start, check_folder, choose_start, claimed_folder

CONFIG = {"kind": "sft", "data": {"train": "a.jsonl"}, "actor": {"model": {"path": "model"}}}


def configured(tmp_path: Path, *overrides: str) -> LoadedConfig:
    file = tmp_path / "sft.yaml"
    file.write_text(json.dumps({**CONFIG, "run": {"dir": str(tmp_path / "run")}}))
    return load_config(str(file), list(overrides))


def leave_run(tmp_path: Path, *overrides: str, step: int | None = 4, logged: int = 4) -> Path:
    """Make a folder as a run leaves it, with files that no run wrote."""
    folder = tmp_path / "run"
    for name in ("rollouts", "trace", "tensorboard", "rollout", "checkpoints", "mine"):
        (folder / name).mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {n + 1}}}\n' for n in range(logged)))
    (folder / "stacks_rank0.txt").touch()
    save_config(configured(tmp_path, *overrides), str(folder / "config.yaml"))
    if step is not None:
        checkpoint = folder / "checkpoints" / f"iter_{step:07d}"
        checkpoint.mkdir()
        (checkpoint / "COMPLETE").touch()
    (folder / "checkpoints" / "iter_0000009.tmp").mkdir()
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {LOCK_FILE}


def test_a_used_folder_is_refused_and_nothing_in_it_changes(tmp_path: Path) -> None:
    folder = leave_run(tmp_path)
    before = names(folder)
    message = r"holds results of another run: checkpoints of the steps 4, metrics.jsonl \(4 lines\).*checkpoint.load=.*run.overwrite=true"
    with pytest.raises(ValueError, match=message), claimed_folder(configured(tmp_path)):
        pass
    with pytest.raises(ValueError, match=message):
        check_folder(configured(tmp_path))
    assert names(folder) == before


@pytest.mark.parametrize(
    "name", ["rollouts/step_000001.jsonl", "bank/step_000000.jsonl", "hf/config.json", "metrics.jsonl"]
)
def test_every_kind_of_result_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}\n")
    with pytest.raises(ValueError, match="holds results of another run"):
        choose_start(configured(tmp_path))


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    folder = leave_run(tmp_path)
    with claimed_folder(configured(tmp_path, "run.overwrite=true")) as messages:
        assert names(folder) == {"mine", "notes.txt"}
    assert "run.overwrite: removed from" in messages[0] and "checkpoints of the steps 4" in messages[0]


def test_overwrite_has_no_part_in_a_run_that_goes_on(tmp_path: Path) -> None:
    """A requeued job has the same overrides as its first start, and checkpoint.load."""
    folder = leave_run(tmp_path)
    before = names(folder)
    loaded = configured(tmp_path, "run.overwrite=true", f"checkpoint.load={folder}")
    with claimed_folder(loaded) as messages:
        assert names(folder) == before and messages == []


def test_overwrite_does_not_remove_what_the_run_reads(tmp_path: Path) -> None:
    folder = leave_run(tmp_path)
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").touch()
    loaded = configured(tmp_path, "run.overwrite=true", f"actor.model.path={folder / 'hf'}")
    with pytest.raises(ValueError, match=r"actor.model.path=.*run.overwrite would remove it"), claimed_folder(loaded):
        pass
    assert (folder / "hf" / "config.json").exists() and (folder / "metrics.jsonl").exists()


def test_the_same_run_begins_again_where_it_ended_before_its_first_checkpoint(tmp_path: Path) -> None:
    """A crash, a kill, a job that ran out of time: the same command goes on from step 0, and what there was is kept."""
    folder = leave_run(tmp_path, step=None)
    with claimed_folder(configured(tmp_path, "run.log_every=7")) as messages:  # changes no number
        assert names(folder) == {"mine", "notes.txt", "ended_1"}
    assert "ended there before its first checkpoint (metrics.jsonl (4 lines))" in messages[0]
    assert (folder / "ended_1" / "metrics.jsonl").read_text().count("\n") == 4
    assert not (folder / "ended_1" / "checkpoints").exists()


def test_another_run_does_not_begin_there(tmp_path: Path) -> None:
    leave_run(tmp_path, step=None)
    with pytest.raises(ValueError, match="holds results of another run"):
        choose_start(configured(tmp_path, "actor.optimizer.lr=1.0"))
    assert choose_start(configured(tmp_path, "run.overwrite=true", "actor.optimizer.lr=1.0")) is Start.overwrites


def test_a_run_that_did_no_step_leaves_nothing_to_refuse(tmp_path: Path) -> None:
    folder = leave_run(tmp_path, step=None, logged=0)
    with claimed_folder(configured(tmp_path, "actor.optimizer.lr=1.0")) as messages:
        assert messages == [] and names(folder) == {"mine", "notes.txt"}


def test_a_folder_without_a_run_keeps_all(tmp_path: Path) -> None:
    (tmp_path / "run" / "trace").mkdir(parents=True)
    with claimed_folder(configured(tmp_path)):
        assert names(tmp_path / "run") == {"trace"}


def test_all_that_a_run_writes_is_known(tmp_path: Path) -> None:
    """tests/e2e/test_chain.py asks the same of a real run's folder."""
    folder = leave_run(tmp_path)
    assert unknown_files(folder) == {"mine", "notes.txt"}


def unknown_files(folder: Path) -> set[str]:
    from hetero_ppo.runtime.run_folder import OTHERS, RESULTS

    known = {path.name for pattern in (*RESULTS, *OTHERS, LOCK_FILE) for path in folder.glob(pattern)}
    return {path.name for path in folder.iterdir()} - known


HOLD = "import sys; from pathlib import Path; from hetero_ppo.runtime.folder_lock import FolderLock\n\
with FolderLock(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"


def test_a_second_run_is_told_who_works_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "WAIT_S", 0.0)
    folder = tmp_path / "run"
    folder.mkdir()
    command, env = [sys.executable, "-c", HOLD, str(folder)], {**os.environ, "SLURM_JOB_ID": "17"}
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        message = rf"a run is working there \(process {first.pid} on \S+, Slurm job 17, since 20\S+\)"
        with pytest.raises(ValueError, match=message), claimed_folder(configured(tmp_path)):
            pass
        with pytest.raises(ValueError, match=message):
            check_folder(configured(tmp_path))
        first.kill()  # the lock ends with its process
    assert find_holder(folder) is None
    with claimed_folder(configured(tmp_path)):
        assert json.loads((folder / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert (folder / LOCK_FILE).read_text() == ""


def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    is_there, may_end = os.pipe(), os.pipe()
    with FolderLock(tmp_path):
        child = os.fork()
        if child == 0:
            os.write(is_there[1], b"1")
            os.read(may_end[0], 1)
            os._exit(0)
        os.read(is_there[0], 1)
    assert find_holder(tmp_path) is None
    os.write(may_end[1], b"1")
    os.waitpid(child, 0)
    for descriptor in (*is_there, *may_end):
        os.close(descriptor)


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / "run").mkdir()
    with claimed_folder(configured(tmp_path)) as messages:
        assert "has no locks (No locks available)" in messages[0]

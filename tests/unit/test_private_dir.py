"""Directories of runs in shared memory: a killed run's goes with the next one's start, a living one's stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hetero_ppo.private_dir import LOCK, PREFIX, PrivateDir, remove_left_behind

MAKE_ONE = "import sys; from hetero_ppo.private_dir import PrivateDir; d = PrivateDir(); print(d.path, flush=True); {}"


def make(then: str) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", MAKE_ONE.format(then)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_killed_runs_directory_is_removed_by_the_next_one() -> None:
    process, path = make("sys.stdin.read()")
    assert path.name.startswith(PREFIX) and path.stat().st_mode & 0o777 == 0o700
    (path / "weights_1").mkdir()
    PrivateDir().remove()
    assert path.exists()  # its process lives
    process.kill()
    process.communicate()
    assert path.exists()
    own = PrivateDir()
    assert not path.exists() and own.path.exists()
    own.remove()
    own.remove()
    assert not own.path.exists()


def test_the_end_of_the_interpreter_removes_it() -> None:
    process, path = make("sys.exit(3)")
    process.communicate()
    assert process.returncode == 3 and not path.exists()


def test_what_is_not_a_runs_directory_stays(tmp_path: Path) -> None:
    without_lock, other = tmp_path / f"{PREFIX}new", tmp_path / "other"
    for folder in (without_lock, other):
        folder.mkdir()
    (other / LOCK).touch()
    (tmp_path / f"{PREFIX}left").mkdir()
    (tmp_path / f"{PREFIX}left" / LOCK).touch()
    (tmp_path / f"{PREFIX}file").touch()
    remove_left_behind(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [f"{PREFIX}file", f"{PREFIX}new", "other"]


def test_nothing_that_others_leave_under_our_names_stops_a_run(tmp_path: Path) -> None:
    """Links (to themselves, to nowhere, to our own folders), fifos, files, foreign folders: each stays, and the rest is removed."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / LOCK).touch()
    hostile = {name: tmp_path / f"{PREFIX}{name}" for name in ("loop", "dangling", "link", "fifo", "file", "locks")}
    hostile["loop"].symlink_to(hostile["loop"])
    hostile["dangling"].symlink_to(tmp_path / "nowhere")
    hostile["link"].symlink_to(elsewhere)
    os.mkfifo(hostile["fifo"])
    hostile["file"].touch()
    for kind in ("loop", "fifo", "folder", "link"):  # in place of a lock
        folder = hostile["locks"].with_name(f"{PREFIX}locks_{kind}")
        folder.mkdir()
        if kind == "loop":
            (folder / LOCK).symlink_to(folder / LOCK)
        elif kind == "link":
            (folder / LOCK).symlink_to(elsewhere / LOCK)
        elif kind == "fifo":
            os.mkfifo(folder / LOCK)
        else:
            (folder / LOCK).mkdir()
    left = tmp_path / f"{PREFIX}zzz_left"
    left.mkdir()
    (left / LOCK).touch()
    before = set(os.listdir(tmp_path)) - {left.name}
    remove_left_behind(tmp_path)
    assert set(os.listdir(tmp_path)) == before and (elsewhere / LOCK).exists()


def test_folders_of_other_users_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign, link = tmp_path / f"{PREFIX}foreign", tmp_path / f"{PREFIX}link"
    foreign.mkdir()
    (foreign / LOCK).touch()
    link.symlink_to(foreign / LOCK)
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)  # the files are then another user's, which takes no root
    remove_left_behind(tmp_path)
    assert (foreign / LOCK).exists() and link.is_symlink()
    monkeypatch.undo()
    remove_left_behind(tmp_path)
    assert not foreign.exists() and link.is_symlink()

"""Files of a checkpoint: the manifest, what is kept, and what damage is called. Roles are saved in tests/e2e."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from tests.helpers.one_rank import ONE_RANK
import torch

from hetero_ppo.checkpoint import manager as manager_module
from hetero_ppo.checkpoint.manager import (
    CheckpointManager,
    best_checkpoint,
    check_contents,
    checkpoint_folder,
    checkpoint_step,
    complete_checkpoints,
)
from hetero_ppo.checkpoint.manifest import (
    COMPLETE,
    find_fault,
    has_own_checksum,
    share_digests,
    read_marker,
    write_marker,
)
from hetero_ppo.checkpoint.random_state import random_state, set_random_state
from hetero_ppo.checkpoint.version import code_version
from hetero_ppo.config.schema import CheckpointConfig


def write_checkpoint(run_dir: Path, step: int, **metrics: float) -> Path:
    folder = run_dir / "checkpoints" / f"iter_{step:07d}"
    (folder / "actor").mkdir(parents=True)
    (folder / "actor" / "weights").write_bytes(bytes(range(256)) * 100)
    (folder / "trainer.json").write_text(json.dumps({"step": step, "metrics": metrics}))
    shares = [share_digests(folder, rank, 2, fsync=True) for rank in range(2)]
    assert all(shares)  # both ranks have work
    write_marker(folder, shares[0] | shares[1])
    return folder


def truncate(folder: Path) -> None:
    (folder / "actor" / "weights").write_bytes(b"short")


def flip(folder: Path) -> None:
    data = bytearray((folder / "actor" / "weights").read_bytes())
    data[4711] ^= 1
    (folder / "actor" / "weights").write_bytes(data)


def remove(folder: Path) -> None:
    (folder / "trainer.json").unlink()


def scribble(folder: Path) -> None:
    (folder / COMPLETE).write_text("{")


def edit_marker(folder: Path) -> None:
    (folder / COMPLETE).write_text((folder / COMPLETE).read_text().replace("25600", "25601"))


def add(folder: Path) -> None:
    (folder / "actor" / COMPLETE).write_text("of another folder")


def link(folder: Path) -> None:
    (folder / "trainer.json").rename(folder.parent / "elsewhere.json")
    (folder / "trainer.json").symlink_to(folder.parent / "elsewhere.json")


def link_folder(folder: Path) -> None:
    (folder / "actor").rename(folder.parent / "elsewhere")
    (folder / "actor").symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (truncate, r"weights has 5 bytes, and had 25600"),
        (flip, r"weights has other contents than were written"),
        (remove, r"trainer.json is missing"),
        (scribble, r"COMPLETE is not readable"),
        (edit_marker, r"COMPLETE is damaged: its own checksum"),
        (add, r"actor/COMPLETE does not belong to it, COMPLETE does not name it; move it out of the folder"),
        (link, r"trainer.json is a link"),
        (link_folder, r"actor is a link"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], None], fault: str) -> None:
    folder = write_checkpoint(tmp_path, 3)
    assert set(read_marker(folder)) == {"actor/weights", "trainer.json"}
    assert [find_fault(folder, rank, 2) for rank in range(2)] == [None, None]
    damage(folder)
    found = [text for text in (find_fault(folder, rank, 2) for rank in range(2)) if text is not None]
    assert found and all(re.search(fault, text) for text in found)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "actor/../../outside", "actor/../trainer.json", "."])
def test_names_in_the_manifest_do_not_leave_the_folder(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path, 3)
    (folder.parent / "outside").write_text("")
    write_marker(folder, {**read_marker(folder), name: (0, 0)})
    with pytest.raises(ValueError, match=rf"COMPLETE names '{re.escape(name)}', which is not a file of the checkpoint"):
        checkpoint_folder(tmp_path, None)


def test_a_marker_of_an_older_version_has_no_checksum_of_itself(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 3)
    assert has_own_checksum(folder)
    (folder / COMPLETE).write_text(json.dumps({"files": read_marker(folder)}))
    assert not has_own_checksum(folder) and checkpoint_folder(tmp_path, None) == folder
    check_contents(folder)
    flip(folder)
    with pytest.raises(ValueError, match=r"iter_0000003 is damaged: .*weights has other contents"):
        check_contents(folder)


def test_the_last_good_checkpoint_is_offered(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        write_checkpoint(tmp_path, step)
    truncate(tmp_path / "checkpoints" / "iter_0000006")
    with pytest.raises(
        ValueError, match=r"iter_0000006 is damaged: .*weights.* last good one is iter_0000004.*checkpoint.step=4"
    ):
        checkpoint_folder(tmp_path, None)
    assert checkpoint_step(tmp_path, 4) == 4
    truncate(tmp_path / "checkpoints" / "iter_0000004")
    truncate(tmp_path / "checkpoints" / "iter_0000002")
    with pytest.raises(ValueError, match="no other complete checkpoint"):
        checkpoint_folder(tmp_path, None)


def test_what_was_never_finished_is_no_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 2)
    write_checkpoint(tmp_path, 4).rename(tmp_path / "checkpoints" / "iter_0000004.tmp")
    assert checkpoint_step(tmp_path, None) == 2
    with pytest.raises(ValueError, match="no complete checkpoint of step 4; there are: 2"):
        checkpoint_folder(tmp_path, 4)


@pytest.mark.parametrize(("metric", "step"), [("eval/accuracy", 2), ("-eval/loss", 4), ("nothing", None)])
def test_the_best_checkpoint(tmp_path: Path, metric: str, step: int | None) -> None:
    values = {2: {"eval/accuracy": 0.9, "eval/loss": 3.0}, 4: {"eval/accuracy": 0.8, "eval/loss": 2.0}, 6: {}}
    folders = [write_checkpoint(tmp_path, number, **metrics) for number, metrics in values.items()]
    best = best_checkpoint(folders, metric)
    assert (None if best is None else best.name) == (None if step is None else f"iter_{step:07d}")


@pytest.mark.parametrize(("is_async", "wait"), [(True, False), (True, True), (False, False)])
def test_a_save_is_waited_for_where_that_is_asked_for(
    is_async: bool, wait: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save always waits for the one before it, and for itself if nothing follows or ``async_save`` is false."""
    finished: list[bool] = []
    monkeypatch.setattr(manager_module, "_rng_file", lambda folder, rank: {})
    monkeypatch.setattr(manager_module.PendingSave, "begin", lambda *_: None)
    monkeypatch.setattr(CheckpointManager, "_snapshot", lambda *_: [])
    monkeypatch.setattr(CheckpointManager, "finish", lambda self, *, wait: finished.append(wait))
    saves = CheckpointManager(tmp_path, CheckpointConfig(async_save=is_async), ONE_RANK, timeout_s=1.0)
    saves.save(1, {}, {}, {}, wait=wait)
    assert finished == ([True] if is_async and not wait else [True, True])


def test_random_generators_come_back() -> None:
    def draw() -> list[float]:
        return [random.gauss(0, 1), float(numpy.random.normal()), float(torch.randn(()))]

    draw()  # Gaussians come in pairs: one is in store
    state = json.loads(json.dumps(random_state()))
    expected = [draw(), draw()]
    set_random_state(state)
    assert [draw(), draw()] == expected


def test_the_code_version_names_the_package() -> None:
    assert code_version().split()[0].count(".") >= 1


def test_retention_leaves_checkpoints_of_other_runs_alone(tmp_path: Path, world: None) -> None:
    """Only what says that this run wrote it is removed."""
    ours, theirs = {"run_id": "a"}, {"run_id": "b"}
    for step, about in {2: theirs, 4: ours, 6: {}, 8: ours, 10: ours, 12: ours}.items():
        state = tmp_path / "checkpoints" / f"iter_{step:07d}" / "trainer.json"
        state.parent.mkdir(parents=True)
        state.write_text(json.dumps({"step": step, "metrics": {}, **about}))
        (state.parent / COMPLETE).touch()
    manager = CheckpointManager(tmp_path, CheckpointConfig(keep=1), ONE_RANK, timeout_s=1.0, about=ours)
    manager._retire(10)  # 12 is of this run, before it went back
    assert sorted(complete_checkpoints(tmp_path)) == [2, 6, 10]

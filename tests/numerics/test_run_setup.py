"""A run sets up its folder, and groups with a deadline, before its trainer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist

from hetero_ppo.config.load import load_config
from hetero_ppo.config.schema import ParallelConfig
from hetero_ppo.distributed.groups import role_groups
from hetero_ppo.trainers import run
from hetero_ppo.trainers.stopping import StopRequests

pytestmark = pytest.mark.usefixtures("world")


def below_a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "run"


def a_file(tmp_path: Path) -> Path:
    (tmp_path / "run").write_text("")
    return tmp_path / "run"


def on_a_file_system_that_takes_no_folder(tmp_path: Path) -> Path:
    return Path("/sys/hetero_ppo_run")  # not even root's


@pytest.mark.parametrize("place", [below_a_file, a_file, on_a_file_system_that_takes_no_folder])
def test_a_run_folder_that_cannot_be_written_is_named_with_the_reason(
    place: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = place(tmp_path), tmp_path / "sft.yaml"
    config.write_text(f"kind: sft\nrun: {{dir: {folder}}}\ndata: {{train: a.jsonl}}\nactor: {{model: {{path: m}}}}\n")
    monkeypatch.setattr(run, "initialise", lambda minutes: dist.group.WORLD)
    monkeypatch.setattr(run, "end_run", lambda: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    started = run.start_run(load_config(str(config), ["run.threads=1"]), StopRequests(1.0))
    with pytest.raises(ValueError, match=rf"run.dir is '{folder}': cannot write there \(\w+[\w ]+\)"), started:
        pass


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_run_starts_with_its_options(deterministic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU gets threads, seeds, deadlines, and kernels that give the same bits twice."""
    given: dict[str, Any] = {"deterministic": False}
    monkeypatch.setattr(run, "platform", SimpleNamespace(HAS_CUDA=True, device=lambda: torch.device("cuda")))
    monkeypatch.setattr(run, "check_compiler", lambda: None)
    monkeypatch.setattr(run, "set_deterministic", lambda variables: given.update(deterministic=True) or {})
    monkeypatch.setattr(run, "initialise", lambda minutes: given.update(minutes=minutes) or dist.group.WORLD)
    monkeypatch.setattr(run, "end_run", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: given.update(threads=threads))
    monkeypatch.setattr(run, "Watchdog", lambda folder, rank, timeout_s, **_: given.update(timeout_s=timeout_s))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    path = tmp_path / "sft.yaml"
    path.write_text("kind: sft\ndata: {train: a.jsonl}\nactor: {model: {path: m}}\n")
    options = {"dir": tmp_path / "run", "threads": 3, "seed": 5, "timeout_minutes": 7, "phase_timeout_minutes": 2}
    overrides = [
        f"run.{name}={value}" for name, value in {**options, "deterministic": str(deterministic).lower()}.items()
    ]
    with run.start_run(load_config(str(path), overrides), StopRequests(1.0)) as started:
        drawn = random.random(), numpy.random.rand(), torch.rand(1)
        assert started.dir == tmp_path / "run" and (started.dir / "config.yaml").is_file()
    assert given == {"threads": 3, "minutes": 7, "timeout_s": 120, "deterministic": deterministic}
    torch.manual_seed(5)
    assert drawn == (random.Random(5).random(), numpy.random.RandomState(5).rand(), torch.rand(1))


def test_a_run_logs_with_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "initialise", lambda minutes: dist.group.WORLD)
    monkeypatch.setattr(run, "end_run", lambda: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    path = tmp_path / "sft.yaml"
    path.write_text("kind: sft\ndata: {train: a.jsonl}\nactor: {model: {path: m}}\n")
    printed: dict[str, str] = {}
    for level, form in (("info", "text"), ("warning", "text"), ("info", "json")):
        overrides = [
            "run.threads=1",
            f"run.dir={tmp_path / form / level}",
            f"run.log_level={level}",
            f"run.log_format={form}",
        ]
        with run.start_run(load_config(str(path), overrides), StopRequests(1.0)):
            pass
        printed[f"{level} {form}"] = capsys.readouterr().out
    assert printed["info text"].startswith("sft run in ") and printed["warning text"] == ""
    first = json.loads(printed["info json"].splitlines()[0])
    assert (first["level"], first["rank"], first["logger"]) == ("info", 0, "hetero_ppo.trainers.run")
    assert first["message"].startswith("sft run in ")


def test_the_deadline_of_a_run_is_that_of_every_group() -> None:
    """torch gives a new group a default of its own, half an hour."""
    groups = role_groups("actor", ParallelConfig())
    for group in (torch.distributed.group.WORLD, groups.tp, groups.dp_cp, groups.pp, groups.ep, groups.embd):
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(minutes=2)  # of the fixture

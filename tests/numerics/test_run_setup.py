"""What a run sets up before its trainer: its folder, and groups with a deadline."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch

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
    monkeypatch.setattr(run, "initialise", lambda minutes: None)  # the world is there
    monkeypatch.setattr(run, "end_run", lambda: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    started = run.start_run(load_config(str(config), ["run.threads=1"]), StopRequests(1.0))
    with pytest.raises(ValueError, match=rf"run.dir is '{folder}': cannot write there \(\w+[\w ]+\)"), started:
        pass


def test_the_deadline_of_a_run_is_that_of_every_group() -> None:
    """torch gives a new group a default of its own, half an hour."""
    groups = role_groups("actor", ParallelConfig())
    for group in (torch.distributed.group.WORLD, groups.tp, groups.dp_cp, groups.pp, groups.ep, groups.embd):
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(minutes=2)  # of the fixture

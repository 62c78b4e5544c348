"""A disk that takes no more: every file that a run writes says which it is, what it takes, what is free, and what to do."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hetero_ppo.cli import config
from hetero_ppo.cli.main import main
from hetero_ppo.config.schema import Dtype, RunConfig
from hetero_ppo.disk import REASONS, writing
from hetero_ppo.errors import RunError
from hetero_ppo.experience.bank import RolloutBank
from hetero_ppo.observability.metrics import MetricsLogger
from hetero_ppo.observability.sinks.jsonl import METRICS_FILE
from hetero_ppo.rollout.replay import RolloutRecord, write_records
from hetero_ppo.rollout.weights.weight_version import check_room_for_another, take_weights
from hetero_ppo.types import Response, StepMetrics
from megatron_bridge.weights.hf_checkpoint import write_safetensors

FULL = Path("/dev/full")
SAID_FULL = r"{} {} could not be written: no space is left there \(No space left on device\).*; .* are free in .*\. Make room there, or .*"


def disk_full_message(what: str, path: Path) -> str:
    return SAID_FULL.format(what, re.escape(str(path)))


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("number", sorted(REASONS))
def test_every_way_in_which_a_disk_takes_no_more_is_said(tmp_path: Path, number: int) -> None:
    path = tmp_path / "a" / "file"  # whose folder is not there
    expected = rf"^report {re.escape(str(path))} could not be written: {re.escape(REASONS[number])} \({re.escape(os.strerror(number))}\); "
    message = rf"{expected}it takes 3 KiB; .* are free in {re.escape(str(tmp_path))}\. Make room"
    with pytest.raises(RunError, match=message), writing(path, "report", 3072):
        raise OSError(number, os.strerror(number))
    with pytest.raises(PermissionError), writing(path, "report"):
        raise PermissionError(errno.EACCES, "no")


def test_metrics(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).symlink_to(FULL)
    logger = MetricsLogger(tmp_path, RunConfig(dir="r", tensorboard=False), is_writer=True)
    with logger, pytest.raises(RunError, match=disk_full_message("metrics of step 3", tmp_path / METRICS_FILE)):
        logger.log(StepMetrics(3, {"train/loss": 1.0}))


def test_rollouts(tmp_path: Path) -> None:
    (tmp_path / "step_000003.partial").symlink_to(FULL)
    record = RolloutRecord(3, 0, [1], [2], [-0.5], "stop", "v")
    with pytest.raises(
        RunError,
        match=disk_full_message("rollouts of step 3", tmp_path / "step_000003.jsonl") + "train.dump_rollouts=false",
    ):
        write_records(tmp_path, 3, [record])


def test_the_bank(tmp_path: Path) -> None:
    """Responses that were banked before stay."""
    bank, response = RolloutBank(tmp_path, resumes=False), Response([5] * 100, [-0.5] * 100, "stop", "v")
    bank.begin(0, "key")
    bank.add(0, response)
    with (
        file_size_limit(2000),
        pytest.raises(RunError, match=r"bank of responses .* \(ulimit -f\).*it takes 1.* KiB.*rollout.bank=false"),
    ):
        bank.add(1, response)
    assert RolloutBank(tmp_path, resumes=True).begin(0, "key") == [(0, response)]
    (tmp_path / "step_000001.partial").symlink_to(FULL)
    with pytest.raises(RunError, match=disk_full_message("bank of responses", tmp_path / "step_000001.jsonl")):
        bank.begin(1, "key")


def test_weights_for_the_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.ones(1000)

    expected = r"weights for the rollout servers .*shard_00000.safetensors could not be written: .*it takes 3.984 KiB.*two versions of the weights"
    with file_size_limit(2000), pytest.raises(RunError, match=expected):
        take_weights(tmp_path / "one", tensors(), "v", Dtype.fp32)
    assert not list(tmp_path.iterdir())
    files = take_weights(tmp_path / "one", tensors(), "v", Dtype.fp32)
    check_room_for_another(files)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3999))
    with pytest.raises(
        RunError, match=r"will not fit beside .*a version takes 3.906 KiB; 3.905 KiB are free in .*shm-size"
    ):
        check_room_for_another(files)


def test_safetensors_files_say_the_systems_error(tmp_path: Path) -> None:
    with file_size_limit(2000), pytest.raises(OSError, match="File too large"):
        write_safetensors({"a": torch.ones(1000)}, tmp_path / "model.safetensors")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_safetensors_files_have_the_rights_of_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "hf").mkdir()
        write_safetensors({"a": torch.ones(10)}, tmp_path / "hf" / "model.safetensors")
        (tmp_path / "hf" / "config.json").touch()
    finally:
        os.umask(before)
    rights = [stat.S_IMODE((tmp_path / "hf" / name).stat().st_mode) for name in ("model.safetensors", "config.json")]
    assert rights == [0o666 & ~umask] * 2


def test_a_command_says_it_with_status_1_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "time": 1.0, "metrics": {"train/loss": 1.0}, "seconds": {}}\n')
    (tmp_path / "config.yaml").write_text("kind: sft\n")
    assert main(["report", "--run", str(tmp_path), "--out", str(FULL)]) == 1
    assert re.search("error: " + disk_full_message("report", FULL) + "choose another --out", capsys.readouterr().err)

    def fails(number: int) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "unknown"))

    monkeypatch.setattr(config, "run", lambda args: fails(errno.EROFS))
    assert main(["config", "--config", "x"]) == 1
    assert re.search(
        r"error: a file .*unknown could not be written: the file system is read-only", capsys.readouterr().err
    )
    monkeypatch.setattr(config, "run", lambda args: fails(errno.EIO))
    with pytest.raises(OSError, match="unknown"):
        main(["config", "--config", "x"])

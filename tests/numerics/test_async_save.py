"""Checkpoints that are written while the run goes on: complete when all of it is on the disk, and as the roles were."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from hetero_ppo.checkpoint import pending
from hetero_ppo.checkpoint.manager import LATEST, CheckpointManager, checkpoint_step
from hetero_ppo.checkpoint.manifest import COMPLETE
from hetero_ppo.config.schema import CheckpointConfig, ModelConfig, OptimizerConfig, TrainedRoleConfig
from hetero_ppo.engines.loss_terms import LossTerm
from hetero_ppo.engines.losses import sft_loss_fn
from hetero_ppo.engines.role_snapshot import RoleSnapshot
from hetero_ppo.engines.train_engine import TrainEngine
from hetero_ppo.errors import RunError
from hetero_ppo.types import AnswerInputs

pytestmark = pytest.mark.usefixtures("world")

VOCAB, ROWS, LENGTH = 61, 4, 9
ENOUGH_S = 60.0


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainEngine]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    Qwen3ForCausalLM(
        Qwen3Config(vocab_size=VOCAB, num_attention_heads=2, num_key_value_heads=1, **sizes)
    ).save_pretrained(folder)
    role = TrainedRoleConfig(ModelConfig(path=str(folder)), optimizer=OptimizerConfig(lr=1e-2, max_skipped_steps=3))
    return {name: TrainEngine(name, role, "lm", 100) for name in ("actor", "critic")}


def train(engine: TrainEngine) -> None:
    ids, mask = torch.randint(0, VOCAB, (ROWS, LENGTH)), torch.ones(ROWS, LENGTH - 1, dtype=torch.bool)
    parts = engine.microbatches(ids, torch.full((ROWS,), LENGTH), AnswerInputs(mask), range(ROWS))
    engine.train_step([LossTerm(parts, sft_loss_fn(VOCAB, engine.groups), mask.sum().item())])


def weights(engines: dict[str, TrainEngine]) -> list[Tensor]:
    return [tensor.clone() for engine in engines.values() for _, tensor in engine.model.stream_weights()]


def manager_of(run_dir: Path, timeout_s: float = ENOUGH_S, **config: object) -> CheckpointManager:
    (run_dir / "config.yaml").write_text("kind: ppo\n")
    return CheckpointManager(run_dir, CheckpointConfig(**config), dist.group.WORLD, timeout_s=timeout_s)


@contextmanager
def held_writer(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Keep the writer from writing until the event."""
    go_on, write = threading.Event(), RoleSnapshot.write
    with monkeypatch.context() as patch:
        patch.setattr(RoleSnapshot, "write", lambda snapshot: go_on.wait(ENOUGH_S) and write(snapshot))
        yield go_on
        go_on.set()


def complete(run_dir: Path) -> list[str]:
    return sorted(path.parent.name for path in (run_dir / "checkpoints").glob(f"*/{COMPLETE}"))


def test_nothing_is_complete_before_all_is_written(
    engines: dict[str, TrainEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on in the meantime, and the checkpoint has the weights from before; it can be loaded when it is complete alone."""
    done: list[int] = []
    with manager_of(tmp_path) as manager:
        before = weights(engines)
        with held_writer(monkeypatch) as go_on:
            manager.save(1, engines, {"a": 1}, {}, wait=False, then=lambda: done.append(1))
            for engine in engines.values():
                train(engine)
            manager.finish(wait=False)
            assert manager.is_saving and not done and not complete(tmp_path)
            assert not (tmp_path / "checkpoints" / LATEST).exists()
            with pytest.raises(ValueError, match="no complete checkpoint below"):
                checkpoint_step(tmp_path, None)
            go_on.set()
            manager.finish(wait=True)
        assert not manager.is_saving and done == [1] and checkpoint_step(tmp_path, None) == 1
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["iter_0000001", LATEST]
        assert not all(torch.equal(a, b) for a, b in zip(weights(engines), before, strict=True))
        manager.load(tmp_path, engines, {"a"})
        assert all(torch.equal(a, b) for a, b in zip(weights(engines), before, strict=True))
        with pytest.raises(
            ValueError, match=r"iter_0000001 has no b, c in trainer.json: another version of this code wrote it \(0\."
        ):
            manager.load(tmp_path, engines, {"a", "c", "b"})


def test_the_next_save_and_one_that_is_waited_for_leave_nothing_in_flight(
    engines: dict[str, TrainEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with manager_of(tmp_path, keep=2) as manager:
        with held_writer(monkeypatch) as go_on:
            manager.save(1, engines, {}, {}, wait=False)
            threading.Timer(0.2, go_on.set).start()
            manager.save(2, engines, {}, {}, wait=False)
            assert complete(tmp_path)[0] == "iter_0000001"
        manager.save(3, engines, {}, {}, wait=True)
        assert not manager.is_saving and complete(tmp_path) == ["iter_0000002", "iter_0000003"]
    with manager_of(tmp_path, async_save=False) as manager:
        manager.save(4, engines, {}, {}, wait=False)
        assert not manager.is_saving and complete(tmp_path)[-1] == "iter_0000004"


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_fault_in_the_background_ends_the_run_and_the_last_good_one_stays(
    engines: dict[str, TrainEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk (that of /dev/full), met by the thread that writes; then one that does not even take the small files."""
    message = r"phase checkpoint: .*of step 2 could not be written .*{}.*of this run: 1$"
    for fault, reason in (("full", "No space left on device"), ("limit", "File too large")):
        run_dir = tmp_path / fault
        run_dir.mkdir()
        with manager_of(run_dir) as manager:
            manager.save(1, engines, {}, {}, wait=True)
            if fault == "full":
                with held_writer(monkeypatch) as go_on:
                    manager.save(2, engines, {}, {}, wait=False)
                    manager._pending.snapshots[1].files[0].symlink_to("/dev/full")
                    go_on.set()
                    manager._pending.written.exception(ENOUGH_S)
                with pytest.raises(RunError, match=message.format(reason)):
                    manager.finish(wait=False)
            else:
                with file_size_limit(128), pytest.raises(RunError, match=message.format(reason)):
                    manager.save(2, engines, {}, {}, wait=False)
        assert checkpoint_step(run_dir, None) == 1
        with manager_of(run_dir) as manager:  # a run that goes on removes what the other one left
            manager.save(3, engines, {}, {}, wait=True)
        assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
            "iter_0000001",
            "iter_0000003",
            LATEST,
        ]


def test_an_export_has_the_rights_of_the_umask_and_one_on_a_full_disk_leaves_the_old_one(
    engines: dict[str, TrainEngine], tmp_path: Path
) -> None:
    engine, out, before = engines["actor"], tmp_path / "hf", os.umask(0o027)
    try:
        with engine.on_device(phase="export"):
            engine.model.export(str(out))
    finally:
        os.umask(before)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == dict.fromkeys(
        ("config.json", "generation_config.json", "model.safetensors"), 0o640
    )
    weights = (out / "model.safetensors").read_bytes()
    size = (len(weights) - 8 - int.from_bytes(weights[:8], "little")) / 1024
    message = rf"export of actor to {out} could not be written: .*ulimit -f.*it takes {size:.4g} KiB; .* hetero-ppo export --run"
    with file_size_limit(4000), pytest.raises(RunError, match=message), engine.on_device(phase="export"):
        engine.model.export(str(out))
    assert (out / "model.safetensors").read_bytes() == weights and [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_disk_without_room_for_one_is_said_before_the_first_step(
    engines: dict[str, TrainEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with (
        manager_of(tmp_path) as manager,
        pytest.raises(ValueError, match=r"a checkpoint takes .* GiB and .* GiB are free there"),
    ):
        manager.check_room(engines)


def test_a_disk_that_does_not_answer_is_not_waited_for_forever(
    engines: dict[str, TrainEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending, "END_WITHIN_S", 0.1)
    message = (
        r"phase checkpoint, rank 0: the files of step 1 are not written .* within 0.00\d+ min \(run.timeout_minutes\)"
    )
    with (
        held_writer(monkeypatch),
        pytest.raises(RunError, match=message),
        manager_of(tmp_path, timeout_s=0.1) as manager,
    ):
        manager.save(1, engines, {}, {}, wait=True)
    assert not complete(tmp_path)


def test_the_count_of_skipped_steps_comes_back(engines: dict[str, TrainEngine], tmp_path: Path) -> None:
    actor = {"actor": engines["actor"]}
    actor["actor"].skipped_in_a_row = 2
    with manager_of(tmp_path) as manager:
        manager.save(1, actor, {}, {}, wait=True)
        actor["actor"].skipped_in_a_row = 0
        manager.load(tmp_path, actor, ())
    assert actor["actor"].skipped_in_a_row == 2
    actor["actor"].skipped_in_a_row = 0
    assert json.loads((tmp_path / "checkpoints" / "iter_0000001" / "trainer.json").read_text())["step"] == 1

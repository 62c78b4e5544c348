"""A checkpoint of somebody else: its checksums are right, and each of its pickles would run a command."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.helpers.bridge_models import save_case
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from transformers import Qwen3Config, Qwen3ForCausalLM

from hetero_ppo.checkpoint.manager import CheckpointManager
from hetero_ppo.checkpoint.manifest import COMPLETE, share_digests, read_marker, write_marker
from hetero_ppo.cli.main import main
from hetero_ppo.config.schema import CheckpointConfig, Dtype, ModelConfig, OptimizerConfig, TrainedRoleConfig
from hetero_ppo.engines.model_engine import ModelEngine
from hetero_ppo.engines.train_engine import TrainEngine
from megatron_bridge.model_provider import Head

pytestmark = pytest.mark.usefixtures("world")

VOCAB = 61


class Command:
    """Unpickled, it runs a command of the shell."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.text,)


@pytest.fixture(scope="module")
def role(tmp_path_factory: pytest.TempPathFactory) -> TrainedRoleConfig:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    Qwen3ForCausalLM(
        Qwen3Config(vocab_size=VOCAB, num_attention_heads=2, num_key_value_heads=1, **sizes)
    ).save_pretrained(folder)
    return TrainedRoleConfig(ModelConfig(path=str(folder)), optimizer=OptimizerConfig(lr=1e-2))


@pytest.fixture(scope="module")
def actor(role: TrainedRoleConfig) -> TrainEngine:
    return TrainEngine("actor", role, "lm", 100)


def metadata_of(folder: Path) -> Metadata:
    return pickle.loads((folder / ".metadata").read_bytes())


def in_description(folder: Path, command: Command) -> None:
    metadata = metadata_of(folder)
    metadata.planner_data = command
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def in_common(folder: Path, command: Command) -> None:
    state = torch.load(folder / "common.pt", weights_only=True)
    torch.save({**state, "command": command}, folder / "common.pt")


def in_an_object(folder: Path, command: Command) -> None:
    """Append a command to the file of a pickled object, and point the checkpoint's description to it."""
    metadata, planted = metadata_of(folder), io.BytesIO()
    torch.save([command], planted)
    index = next(
        i for i in metadata.storage_data if isinstance(metadata.state_dict_metadata[i.fqn], BytesStorageMetadata)
    )
    info = metadata.storage_data[index]
    with (folder / info.relative_path).open("ab") as file:
        info.offset, info.length = file.tell(), len(planted.getvalue())
        file.write(planted.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def outside(folder: Path, command: Command) -> None:
    metadata = metadata_of(folder)
    other = folder.parent / "planted.distcp"
    torch.save([command], other)
    for info in metadata.storage_data.values():
        info.relative_path = f"../{other.name}"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("plant", "refusal"),
    [
        (in_description, r"\.metadata would run or make posix.system when it is read"),
        (in_common, r"common\.pt holds more than values: .*posix\.system"),
        (in_an_object, r"_extra_state.* holds more than values: .*posix\.system"),
        (outside, r"\.metadata names the file '\.\./planted\.distcp', which is not in"),
    ],
)
def test_no_pickle_of_a_checkpoint_runs(
    actor: TrainEngine,
    role: TrainedRoleConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[Path, Command], None],
    refusal: str,
) -> None:
    """Neither on resume nor in an export, also where the environment asks torch to unpickle everything."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    (tmp_path / "config.yaml").write_text("kind: sft\n")
    ran, folder = tmp_path / "ran", tmp_path / "checkpoints" / "iter_0000001"
    with CheckpointManager(tmp_path, CheckpointConfig(), dist.group.WORLD, timeout_s=60.0) as manager:
        manager.save(1, {"actor": actor}, {}, {}, wait=True)
        plant(folder / "actor", Command(f"touch {ran}"))
        (folder / COMPLETE).unlink()
        write_marker(folder, share_digests(folder, 0, 1, fsync=False))
        with pytest.raises(ValueError, match=refusal):
            manager.load(tmp_path, {"actor": actor}, ())
    with pytest.raises(ValueError, match=refusal):
        ModelEngine("actor", role, "lm").load_weights(folder / "actor")
    assert not ran.exists()


def test_a_checkpoint_of_an_older_version_is_loaded_and_said(
    actor: TrainEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (tmp_path / "config.yaml").write_text("kind: sft\n")
    folder = tmp_path / "checkpoints" / "iter_0000001"
    with CheckpointManager(tmp_path, CheckpointConfig(), dist.group.WORLD, timeout_s=60.0) as manager:
        manager.save(1, {"actor": actor}, {}, {}, wait=True)
        manager.load(tmp_path, {"actor": actor}, ())
        assert "an older version" not in caplog.text
        (folder / COMPLETE).write_text(json.dumps({"files": read_marker(folder)}))
        manager.load(tmp_path, {"actor": actor}, ())
    assert f"checkpoint {folder}: an older version wrote it, without a checksum of its list of files" in caplog.text


def test_an_export_looks_at_the_contents_first(
    actor: TrainEngine, role: TrainedRoleConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes the weights alone, and needs no more of the run than its configuration."""
    (tmp_path / "config.yaml").write_text(
        f"kind: sft\nrun: {{dir: r}}\ndata: {{train: d}}\nactor: {{model: {{path: {role.model.path}}}}}\n"
    )
    with CheckpointManager(tmp_path, CheckpointConfig(), dist.group.WORLD, timeout_s=60.0) as manager:
        manager.save(1, {"actor": actor}, {}, {}, wait=True)
    path = tmp_path / "checkpoints" / "iter_0000001" / "actor" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)
    assert main(["export", "--run", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert (
        f"{path} has other contents than were written (CRC-32)" in capsys.readouterr().err
        and not (tmp_path / "out").exists()
    )


@pytest.mark.parametrize(
    ("case", "dtype", "distributed", "head"),
    [
        ("qwen3_tied", Dtype.fp32, False, "lm"),
        ("llama_untied", Dtype.bf16, True, "value"),
        ("qwen3_moe_untied", Dtype.bf16, True, "lm"),
        ("qwen3_moe_tied", Dtype.fp32, False, "score"),
    ],
)
def test_honest_checkpoints_of_every_kind_load(
    tmp_path: Path, case: str, dtype: Dtype, distributed: bool, head: Head
) -> None:
    source = save_case(case, tmp_path / "source")
    config = TrainedRoleConfig(
        ModelConfig(path=str(source), dtype=dtype), optimizer=OptimizerConfig(distributed=distributed)
    )
    (tmp_path / "config.yaml").write_text("kind: sft\n")
    engine = TrainEngine("actor", config, head, 100)
    before = {name: tensor.clone() for name, tensor in engine.model.stream_weights()}
    with CheckpointManager(tmp_path, CheckpointConfig(), dist.group.WORLD, timeout_s=60.0) as manager:
        manager.save(1, {"actor": engine}, {}, {}, wait=True)
        for chunk in engine.model.models:
            for parameter in chunk.parameters():
                parameter.data.zero_()
        manager.load(tmp_path, {"actor": engine}, ())
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.model.stream_weights())
    weights_alone = ModelEngine("actor", config, head)
    weights_alone.load_weights(tmp_path / "checkpoints" / "iter_0000001" / "actor")
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_alone.stream_weights())

"""Weights that a worker loads from the trainer's own memory, and the checksum that both compute where the bytes are."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hetero_ppo.config.schema import Dtype, WeightTransfer
from hetero_ppo.errors import RunError
from hetero_ppo.rollout.weights import tensor_bytes, weight_sync
from hetero_ppo.rollout.weights.cuda_ipc import IpcHandle
from hetero_ppo.rollout.weights.device_blocks import DeviceBlocks
from hetero_ppo.rollout.weights.loaded_weights import compare_pieces
from hetero_ppo.rollout.weights.tensor_bytes import lane_checksum
from hetero_ppo.rollout.weights.transports import weight_transport
from hetero_ppo.rollout.weights.weight_group import Shard
from hetero_ppo.rollout.weights.weight_sync import BlockWriter, PinnedStaging, WeightFiles, stage, swap, write_weights
from hetero_ppo.rollout.weights.worker_extension import WeightReceiver

CPU = torch.device("cpu")
WORD = (1 << 64) - 1


# --- the checksum ---


def test_a_checksum_by_hand() -> None:
    """Lanes 1, 2, -3: A = 0, B = 1 + 4 - 9 = -4. The float 1.0 is 0x3f800000: lanes 0 and 0x3f80, so B = 2 * 0x3f80. -1 as bf16: 0xbf80."""
    assert lane_checksum(torch.tensor([1, 2, -3], dtype=torch.int16)) == "3-0000000000000000-fffffffffffffffc"
    assert lane_checksum(torch.tensor(1.0)) == "2-0000000000003f80-0000000000007f00"
    assert (
        lane_checksum(torch.tensor([-1.0], dtype=torch.bfloat16))
        == f"1-{WORD + 1 - 0x4080:016x}-{WORD + 1 - 0x4080:016x}"
    )
    assert lane_checksum(torch.empty(0)) == f"0-{0:016x}-{0:016x}"


@pytest.mark.parametrize(
    ("rows", "lanes", "sizes"), [(4, 8, (1, 7, 8, 9, 32, 33, 63, 64, 65, 200)), (None, None, (70_001, (1 << 17) + 3))]
)
def test_it_is_what_numpy_and_integers_give(
    rows: int | None, lanes: int | None, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Around the ends of rows and of blocks of rows, small ones, and the real ones."""
    if rows is not None:
        monkeypatch.setattr(tensor_bytes, "ROWS", rows)
        monkeypatch.setattr(tensor_bytes, "ROW_LANES", lanes)
    for size in sizes:
        tensor = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(torch.bfloat16)
        values = np.frombuffer(tensor.view(torch.int16).clone().numpy().tobytes(), dtype="<i2").astype(object)
        total, moment = int(values.sum()), int((values * np.arange(1, size + 1).astype(object)).sum())
        assert lane_checksum(tensor) == f"{size:x}-{total & WORD:016x}-{moment & WORD:016x}"


def test_it_sees_flipped_bits_swaps_and_missing_ends() -> None:
    tensor = torch.randn(12, generator=torch.Generator().manual_seed(1))
    seen = {lane_checksum(tensor)}
    for place in range(12):
        for bit in range(32):
            changed = tensor.clone()
            changed.view(torch.int32)[place] ^= -(2**31) if bit == 31 else 1 << bit
            seen.add(lane_checksum(changed))
    for first in range(12):
        for second in range(first):
            swapped = tensor.clone()
            swapped[[first, second]] = swapped[[second, first]]
            assert lane_checksum(swapped) != lane_checksum(tensor)
    assert len(seen) == 1 + 12 * 32, "each flipped bit gives another checksum"
    assert lane_checksum(torch.zeros(8)) != lane_checksum(torch.zeros(7)), "zeros count, too"
    assert lane_checksum(tensor.view(3, 4).t()) == lane_checksum(tensor.view(3, 4).t().contiguous())


def test_parameters_are_compared_by_the_same_checksum() -> None:
    sent = {"a": torch.randn(4, 3), "b": torch.randn(4, 3)}
    sums = {name: lane_checksum(tensor) for name, tensor in sent.items()}
    pieces = {"a": sent["a"][:2].clone(), "b": sent["b"][:2].clone()}  # a tensor-parallel rank's
    assert compare_pieces(pieces, sent, sums, rank=0, size=2, checksum=lane_checksum) == {"a": False, "b": False}
    swapped = {"a": sent["b"], "b": sent["a"]}
    assert compare_pieces(swapped, sent, sums, checksum=lane_checksum) == {"a": True, "b": True}
    assert compare_pieces(dict(sent), sent, sums, checksum=lane_checksum) == {"a": False, "b": False}


# --- blocks ---


def reused(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors as an actor streams them: each is a view of the same buffer."""
    buffer = torch.empty(max(tensor.numel() for tensor in tensors.values()))
    for name, tensor in tensors.items():
        view = buffer[: tensor.numel()].view(tensor.shape)
        view.copy_(tensor)
        yield name, view


@pytest.fixture
def tensors(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    monkeypatch.setattr(weight_sync, "SHARD_BYTES", 100)
    return {f"t{i}": torch.randn(5, 3 + i, generator=torch.Generator().manual_seed(i)) for i in range(5)}


@pytest.mark.parametrize("dtype", [Dtype.fp32, Dtype.bf16])
def test_a_block_has_the_bytes_of_its_file(tensors: dict[str, Tensor], tmp_path: Path, dtype: Dtype) -> None:
    plain = write_weights(tmp_path / "plain", iter(tensors.items()), "v1", dtype)
    blocks: list[Shard] = []
    packed = write_weights(
        tmp_path / "packed", reused(tensors), "v1", dtype, BlockWriter(PinnedStaging(), blocks.append)
    )
    assert [path.read_bytes() for path in packed.paths] == [path.read_bytes() for path in plain.paths] and len(
        blocks
    ) > 1
    assert packed.checksums == plain.checksums and packed.num_bytes == plain.num_bytes
    found = {name: tensor for block in blocks for name, tensor in block.tensors().items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name].to(found[name].dtype)) for name in tensors)


# --- from the trainer to a worker ---


class Worker(WeightReceiver):
    """vLLM's worker, which takes what it is given."""

    device = CPU
    hetero_ppo_rank = 0
    model_config = None

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.hetero_ppo_expected = ({name: list(tensor.shape) for name, tensor in tensors.items()}, set())
        self.loaded: dict[str, Tensor] = {}

    def _hetero_ppo_load(self, tensors: dict[str, Tensor]) -> None:
        self.loaded = dict(tensors)


class Client:
    """Calls the worker as the server does; what goes over is JSON."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.server, self.num_opened = worker, SimpleNamespace(name="server 0"), 1
        self.methods: list[str] = []

    async def call_worker(self, phase: str, method: str, timeout_s: float, **arguments: Any) -> list[dict[str, Any]]:
        self.methods.append(method)
        answer = getattr(self.worker, method)(**json.loads(json.dumps(arguments)))
        return [json.loads(json.dumps(answer))]

    async def post(self, *_: Any) -> dict[str, bool]:
        return {"success": True}


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> dict[int, Tensor]:
    """Handles that stand for shared memory of the host, by number."""
    memory: dict[int, Tensor] = {}

    def of(block: Tensor) -> IpcHandle:
        memory[len(memory)] = block.share_memory_()
        return IpcHandle(b"", block.numel(), len(memory) - 1, b"", 0, b"", True)

    monkeypatch.setattr(IpcHandle, "of", staticmethod(of))
    monkeypatch.setattr(IpcHandle, "open", lambda handle, device: memory[handle.offset_bytes])
    return memory


def sync(transport: DeviceBlocks, client: Client, tensors: dict[str, Tensor], folder: Path) -> WeightFiles:
    """Write and deliver, as the engine and its pool do."""
    files = write_weights(folder, reused(tensors), "v1", Dtype.fp32, BlockWriter(PinnedStaging(), transport.keep))
    assert asyncio.run(transport.deliver([client], files)) == {}
    return files


def load(transport: DeviceBlocks, client: Client, files: WeightFiles) -> None:
    async def run() -> None:
        await stage(client, files, 5.0, reads_files=False, checksums=transport.checksums(files))
        await swap(client, files, 5.0, verify=False)

    asyncio.run(run())
    transport.release()


def test_a_worker_loads_from_the_trainer_s_memory(
    tensors: dict[str, Tensor], shared: dict[int, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very bytes: no file and no copy are made at the worker's end. Afterwards neither end holds the blocks."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    client, transport = Client(Worker(tensors)), weight_transport(WeightTransfer.cuda_ipc, CPU, 5.0)
    assert isinstance(transport, DeviceBlocks) and transport.keeps_blocks and not transport.reads_files
    load(transport, client, sync(transport, client, tensors, tmp_path / "w"))
    loaded = client.worker.loaded
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    blocks = {block.untyped_storage().data_ptr() for block in shared.values()}
    assert {tensor.untyped_storage().data_ptr() for tensor in loaded.values()} == blocks and len(blocks) > 1
    assert client.worker.hetero_ppo_arrived == () and transport._blocks == []


def test_a_restarted_worker_gets_blocks_of_the_files(
    tensors: dict[str, Tensor], shared: dict[int, Tensor], tmp_path: Path
) -> None:
    client, transport = Client(Worker(tensors)), DeviceBlocks(CPU, 5.0, PinnedStaging())
    files = write_weights(tmp_path / "w", iter(tensors.items()), "v1", Dtype.fp32)
    assert asyncio.run(transport.deliver([client], files)) == {}
    load(transport, client, files)
    assert all(torch.equal(client.worker.loaded[name], tensors[name]) for name in tensors)


def test_a_bit_that_is_lost_on_the_way_names_the_tensor_before_the_load(
    tensors: dict[str, Tensor], shared: dict[int, Tensor], tmp_path: Path
) -> None:
    client, transport = Client(Worker(tensors)), DeviceBlocks(CPU, 5.0, PinnedStaging())
    files = sync(transport, client, tensors, tmp_path / "w")
    client.worker.hetero_ppo_arrived[-1].tensors()["t4"].view(torch.int32)[2, 1] ^= 4
    with pytest.raises(RunError, match=r"read other bytes than were written for \['t4'\]"):
        load(transport, client, files)
    assert client.worker.loaded == {} and "hetero_ppo_load_staged" not in client.methods


def test_blocks_of_another_sync_are_refused(
    tensors: dict[str, Tensor], shared: dict[int, Tensor], tmp_path: Path
) -> None:
    client, transport = Client(Worker(tensors)), DeviceBlocks(CPU, 5.0, PinnedStaging())
    sync(transport, client, tensors, tmp_path / "w")
    files = write_weights(tmp_path / "other", iter([("x", torch.ones(3))]), "v2", Dtype.fp32)
    with pytest.raises(RunError, match="the blocks on the device are not those of the weights 'v2'"):
        asyncio.run(transport.deliver([client], files))


def test_a_worker_on_another_device_is_an_error(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, transport = Client(Worker(tensors)), DeviceBlocks(CPU, 5.0, PinnedStaging())
    monkeypatch.setattr(Worker, "hetero_ppo_device", lambda worker: {"device": "GPU-7"})
    with pytest.raises(RunError, match="cuda_ipc: server 0 is on the device GPU-7, the trainer on cpu; use collective"):
        sync(transport, client, tensors, tmp_path / "w")


@pytest.mark.gpu
def test_a_gpu_gives_the_checksum_of_a_cpu() -> None:
    tensor = torch.randn((1 << 22) + 5, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    assert lane_checksum(tensor.cuda()) == lane_checksum(tensor)

"""Buckets of weights on their way from the trainer's device to a worker's, and the checksum that both compute where the bytes are."""

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

from hetero_ppo.config.derived import keeps_weight_files, sends_buckets
from hetero_ppo.config.schema import Dtype, RolloutConfig, WeightTransfer
from hetero_ppo.errors import RunError
from hetero_ppo.rollout.generator import Capabilities, NullGenerator
from hetero_ppo.rollout.weights import tensor_bytes, weight_version, worker_extension
from hetero_ppo.rollout.weights.bucket import Bucket, PinnedStaging
from hetero_ppo.rollout.weights.cuda_ipc import IpcHandle
from hetero_ppo.rollout.weights.device_buckets import DeviceBuckets
from hetero_ppo.rollout.weights.loaded_weights import compare_pieces
from hetero_ppo.rollout.weights.tensor_bytes import checksum_on, host_checksum, lane_checksum
from hetero_ppo.rollout.weights.transports import weight_transport
from hetero_ppo.rollout.weights.weight_sync import stage, swap
from hetero_ppo.rollout.weights.weight_version import Packer, WeightVersion, take_weights
from hetero_ppo.rollout.weights.worker_extension import BucketFile, PolicyHandler, WeightReceiver

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


# --- buckets ---


def reused(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors as an actor streams them: each is a view of the same buffer."""
    buffer = torch.empty(max(tensor.numel() for tensor in tensors.values()))
    for name, tensor in tensors.items():
        view = buffer[: tensor.numel()].view(tensor.shape)
        view.copy_(tensor)
        yield name, view


@pytest.fixture
def tensors(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    monkeypatch.setattr(weight_version, "SHARD_BYTES", 100)
    return {f"t{i}": torch.randn(5, 3 + i, generator=torch.Generator().manual_seed(i)) for i in range(5)}


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checksums of the trainer's and the worker's device are sums of lanes."""
    for module in (weight_version, worker_extension):
        monkeypatch.setattr(module, "checksum_on", lambda device: lane_checksum)


def packed(
    folder: Path | None, tensors: dict[str, Tensor], version: str = "v1", dtype: Dtype = Dtype.fp32
) -> WeightVersion:
    return take_weights(folder, reused(tensors), version, dtype, Packer(PinnedStaging(), keeps_buckets=True))


@pytest.mark.parametrize("dtype", [Dtype.fp32, Dtype.bf16])
def test_a_bucket_has_the_bytes_of_its_file(tensors: dict[str, Tensor], tmp_path: Path, dtype: Dtype) -> None:
    plain = take_weights(tmp_path / "plain", iter(tensors.items()), "v1", dtype)
    both, no_files = packed(tmp_path / "packed", tensors, dtype=dtype), packed(None, tensors, dtype=dtype)
    assert [path.read_bytes() for path in both.paths] == [path.read_bytes() for path in plain.paths]
    assert len(both.buckets) == len(both.paths) > 1 and plain.buckets == [] and no_files.paths == []
    for weights in (both, no_files):
        assert weights.checksums == plain.checksums and weights.num_bytes == plain.num_bytes
        found = {name: tensor for bucket in weights.buckets for name, tensor in bucket.tensors().items()}
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name].to(found[name].dtype)) for name in tensors)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "packed", tmp_path / "plain"]


def test_a_bucket_of_a_gpu_that_servers_read_as_a_file_has_the_files_checksums(
    tensors: dict[str, Tensor], tmp_path: Path, as_on_a_gpu: None
) -> None:
    plain = take_weights(tmp_path / "plain", iter(tensors.items()), "v1", Dtype.fp32)
    by_file = take_weights(
        tmp_path / "packed", reused(tensors), "v1", Dtype.fp32, Packer(PinnedStaging(), keeps_buckets=False)
    )
    assert by_file.checksums == plain.checksums and by_file.buckets == []
    assert packed(None, tensors).checksums == {name: lane_checksum(tensor) for name, tensor in tensors.items()}
    assert checksum_on(torch.device("cuda", 0)) is lane_checksum and checksum_on(CPU) is not lane_checksum


def test_files_are_written_where_servers_read_them_or_may_lose_their_weights() -> None:
    one, two = RolloutConfig(max_restarts=0), RolloutConfig(max_restarts=0, tensor_parallel=2)
    assert [sends_buckets(kind, one) for kind in (WeightTransfer.shared_memory, WeightTransfer.collective)] == [
        False,
        True,
    ]
    assert not sends_buckets(WeightTransfer.collective, two), "the model may not fit on one of a server's GPUs"
    assert not keeps_weight_files(one, sent=True, can_sleep=False)
    assert keeps_weight_files(one, sent=False, can_sleep=False) and keeps_weight_files(one, sent=True, can_sleep=True)
    assert keeps_weight_files(RolloutConfig(max_restarts=1), sent=True, can_sleep=False)


# --- from the trainer to a worker ---


class Handler(PolicyHandler):
    """Takes what it is given in place of a model."""

    loaded: dict[str, Tensor]

    def _load(self, tensors: dict[str, Tensor]) -> None:
        self.loaded = dict(tensors)


class Worker(WeightReceiver):
    """vLLM's worker without a model."""

    device = CPU
    hetero_ppo_rank = 0
    model_config = None

    def __init__(self, tensors: dict[str, Tensor], rank: int = 0, size: int = 1) -> None:
        self.hetero_ppo_rank = rank
        self.parallel_config = SimpleNamespace(tensor_parallel_size=size)
        self.handler = Handler(self)
        self.handler._expected = ({name: list(tensor.shape) for name, tensor in tensors.items()}, set())
        self.hetero_ppo_handlers = {"policy": self.handler}


class Client:
    """Calls the workers as their server does; what goes over is JSON."""

    def __init__(self, tensors: dict[str, Tensor], index: int = 0, num_workers: int = 1) -> None:
        self.workers = [Worker(tensors, rank, num_workers) for rank in range(num_workers)]
        self.server, self.num_opened = SimpleNamespace(name=f"server {index}", index=index), 1
        self.methods: list[str] = []

    async def call_worker(self, phase: str, method: str, timeout_s: float, **arguments: Any) -> list[dict[str, Any]]:
        self.methods.append(method)
        text = json.dumps(arguments)
        calls = [asyncio.to_thread(getattr(worker, method), **json.loads(text)) for worker in self.workers]
        return [json.loads(json.dumps(answer)) for answer in await asyncio.gather(*calls)]

    async def post(self, *_: Any) -> dict[str, bool]:
        return {"success": True}

    @property
    def loaded(self) -> dict[str, Tensor]:
        return self.workers[0].handler.loaded


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> dict[int, Tensor]:
    """Handles that stand for shared memory of the host, by number."""
    memory: dict[int, Tensor] = {}

    def of(block: Tensor) -> IpcHandle:
        memory[len(memory)] = block if block.is_shared() else block.share_memory_()
        return IpcHandle(b"", block.numel(), len(memory) - 1, b"", 0, b"", True)

    monkeypatch.setattr(IpcHandle, "of", staticmethod(of))
    monkeypatch.setattr(IpcHandle, "open", lambda handle, device: memory[handle.offset_bytes])
    return memory


def new_transport(kind: WeightTransfer = WeightTransfer.cuda_ipc, **config: Any) -> DeviceBuckets:
    transport = weight_transport(kind, RolloutConfig(sync_timeout_s=5.0, **config), CPU)
    assert isinstance(transport, DeviceBuckets) and not transport.reads_files
    return transport


async def load(transport: DeviceBuckets, clients: list[Client], weights: WeightVersion) -> None:
    """Deliver, check and load, as the pool does."""
    assert await transport.deliver(clients, weights) == {}  # type: ignore[arg-type]
    for client in clients:
        await stage(client, weights, 5.0, reads_files=False)  # type: ignore[arg-type]
        await swap(client, weights, 5.0, verify=False)  # type: ignore[arg-type]
    transport.release(weights)


def same(found: dict[str, Tensor], tensors: dict[str, Tensor]) -> bool:
    return found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_worker_loads_from_the_trainer_s_memory(
    tensors: dict[str, Tensor], shared: dict[int, Tensor], as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very bytes: neither end makes a file, and the worker makes no copy. Afterwards neither end holds the buckets."""
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    client, weights = Client(tensors), packed(None, tensors)
    blocks = {bucket.data.data_ptr() for bucket in weights.buckets}
    asyncio.run(load(new_transport(), [client], weights))
    assert same(client.loaded, tensors)
    held = {block.untyped_storage().data_ptr() for block in shared.values()}
    assert {tensor.untyped_storage().data_ptr() for tensor in client.loaded.values()} == held and len(blocks) > 1
    assert client.workers[0].handler.arrived == () and weights.buckets == []


def test_workers_of_other_devices_get_the_buckets_by_a_broadcast(
    tensors: dict[str, Tensor], as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two servers, by gloo. No file is made at either end, and the second sync uses the group of the first."""
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    clients, transport = [Client(tensors, 0), Client(tensors, 1)], new_transport(WeightTransfer.collective)

    async def run() -> None:
        for version in ("v1", "v2"):
            weights = packed(None, tensors, version)
            await load(transport, clients, weights)
            assert weights.buckets == []

    asyncio.run(run())
    for client in clients:
        assert same(client.loaded, tensors) and client.methods.count("hetero_ppo_join") == 1


def test_workers_of_one_server_share_a_file_of_what_the_first_one_got(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    client, transport = Client(tensors, num_workers=2), new_transport(WeightTransfer.collective, tensor_parallel=2)
    assert not transport.sends_buckets
    weights = take_weights(tmp_path / "w", iter(tensors.items()), "v1", Dtype.fp32)
    seen: list[int] = []

    async def run() -> None:
        assert await transport.deliver([client], weights) == {}  # type: ignore[list-item]
        seen.append(len(list(tmp_path.glob("hetero_ppo_policy_*"))))
        await stage(client, weights, 5.0, reads_files=False)  # type: ignore[arg-type]
        await swap(client, weights, 5.0, verify=False)  # type: ignore[arg-type]

    asyncio.run(run())
    assert seen == [len(weights.paths)] and not list(tmp_path.glob("hetero_ppo_policy_*"))
    assert all(same(worker.handler.loaded, tensors) for worker in client.workers)


def test_a_restarted_worker_gets_buckets_of_the_files(
    tensors: dict[str, Tensor], shared: dict[int, Tensor], as_on_a_gpu: None, tmp_path: Path
) -> None:
    """Those of its version, with the checksums that were taken of the device, whatever else is on its way."""
    client, transport = Client(tensors), new_transport()
    old = packed(tmp_path / "old", tensors)
    transport.release(old)
    new = packed(tmp_path / "new", {name: 2 * tensor for name, tensor in tensors.items()}, "v2")
    asyncio.run(load(transport, [client], old))
    assert same(client.loaded, tensors) and old.buckets == [] and len(new.buckets) == len(new.paths)


def test_a_delivery_is_whole_when_another_server_releases_the_buckets(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two servers are restarted at the same time: one has loaded while the other one still receives."""
    client, transport = Client(tensors), new_transport(WeightTransfer.collective)
    weights = packed(tmp_path / "w", tensors)
    receive = Worker.hetero_ppo_receive

    def release_and_receive(worker: Worker, **arguments: Any) -> dict[str, Any]:
        transport.release(weights)
        return receive(worker, **arguments)

    monkeypatch.setattr(Worker, "hetero_ppo_receive", release_and_receive)
    asyncio.run(load(transport, [client], weights))
    assert same(client.loaded, tensors)


def test_a_bit_that_is_lost_on_the_way_names_the_tensor_before_the_load(
    tensors: dict[str, Tensor], shared: dict[int, Tensor], as_on_a_gpu: None
) -> None:
    client, weights = Client(tensors), packed(None, tensors)
    weights.buckets[-1].tensors()["t4"].view(torch.int32)[2, 1] ^= 4
    with pytest.raises(RunError, match=r"read other bytes than were written for \['t4'\]"):
        asyncio.run(load(new_transport(), [client], weights))
    assert not hasattr(client.workers[0].handler, "loaded") and "hetero_ppo_load_staged" not in client.methods


def test_checksums_are_computed_where_the_bytes_are(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """A bucket stays on the worker's GPU; files are in host memory whatever the worker's device is."""
    handler = Worker(tensors).handler
    handler.worker.device = torch.device("cuda", 0)
    assert handler.checksum is host_checksum
    handler.arrived = (BucketFile({}, tmp_path),)
    assert handler.checksum is host_checksum
    handler.arrived = (Bucket({}, torch.empty(0)),)
    assert handler.checksum is lane_checksum


def test_a_worker_on_another_device_is_an_error(tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "hetero_ppo_device", lambda worker: {"device": "GPU-7"})
    with pytest.raises(RunError, match="cuda_ipc: server 0 is on the device GPU-7, the trainer on cpu; use collective"):
        asyncio.run(load(new_transport(), [Client(tensors)], packed(None, tensors)))


# --- targets ---


def test_another_target_is_refused_at_both_ends(tensors: dict[str, Tensor]) -> None:
    """The name goes with every message. Nothing is read or staged for a model that the server does not have."""
    message = "there is no target 'drafter'; the targets are policy"
    with pytest.raises(ValueError, match=message):
        NullGenerator(Capabilities()).sync_weights(iter(()), "v1", target="drafter")
    drafter = take_weights(
        None, iter(tensors.items()), "v1", Dtype.fp32, Packer(PinnedStaging(), keeps_buckets=True), "drafter"
    )
    client = Client(tensors)
    with pytest.raises(ValueError, match=message):
        asyncio.run(stage(client, drafter, 5.0))  # type: ignore[arg-type]
    header = Bucket({}, torch.empty(0)).header
    for call in (
        lambda: client.workers[0].hetero_ppo_receive("drafter", header, None, 0),
        lambda: client.workers[0].hetero_ppo_load_staged("drafter", verify=False),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.gpu
def test_a_gpu_gives_the_checksum_of_a_cpu() -> None:
    tensor = torch.randn((1 << 22) + 5, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    assert lane_checksum(tensor.cuda()) == lane_checksum(tensor)

"""Weights on their way: groups of their own, handles as JSON, and what is left when a member fails."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hetero_ppo.config.derived import weight_transfer
from hetero_ppo.config.schema import Dtype, RolloutConfig, WeightTransfer
from hetero_ppo.rollout.weights.cuda_ipc import IpcHandle
from hetero_ppo.network import KeptPort, own_address
from hetero_ppo.rollout.weights.bucket import map_bucket, num_bytes
from hetero_ppo.rollout.weights.weight_group import Rendezvous, WeightGroup, join_store, open_store
from hetero_ppo.rollout.weights.weight_version import take_weights

CPU = torch.device("cpu")
HANDLE = IpcHandle(bytes(range(64)), 4096, 512, b"/torch_1_2", 3, b"\x00\xff" * 32, True)


def test_auto_depends_on_places_alone() -> None:
    assert weight_transfer(RolloutConfig(), one_node=True) is WeightTransfer.shared_memory
    assert weight_transfer(RolloutConfig(), one_node=False) is WeightTransfer.collective
    for asked in (WeightTransfer.collective, WeightTransfer.cuda_ipc):
        assert weight_transfer(RolloutConfig(weight_transfer=asked), one_node=True) is asked


def test_a_bucket_is_the_bytes_of_its_file(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7), "scalar": torch.tensor(2.0)}
    files = take_weights(tmp_path / "w", iter(tensors.items()), "v1", Dtype.bf16)
    bucket = map_bucket(files.paths[0])
    assert bucket.data.numel() == num_bytes(bucket.header) == files.num_bytes
    found = replace(bucket, header=json.loads(json.dumps(bucket.header))).tensors()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name].to(torch.bfloat16)) for name in tensors)


def make_rendezvous(port: int, size: int, **seconds: float) -> Rendezvous:
    deadlines = {"join_timeout_s": 10.0, "broadcast_timeout_s": 10.0} | seconds
    return Rendezvous(host="127.0.0.1", port=port, name="weights 1", key="5e" * 32, size=size, **deadlines)


def test_a_group_of_its_own_leaves_the_default_group_alone() -> None:
    store = open_store("127.0.0.1", 10.0)
    assert listening_only_on_loopback(store.port)
    rendezvous = make_rendezvous(store.port, 3)
    arrived = {rank: torch.zeros(1000, dtype=torch.uint8) for rank in (1, 2)}

    def member(rank: int) -> None:
        WeightGroup(join_store(rendezvous), rendezvous, rank, CPU).broadcast(arrived[rank])

    threads = [threading.Thread(target=member, args=(rank,)) for rank in arrived]
    for thread in threads:
        thread.start()
    sent = torch.arange(1000).to(torch.uint8)
    WeightGroup(store, rendezvous, 0, CPU).broadcast(sent)
    for thread in threads:
        thread.join()
    assert all(torch.equal(data, sent) for data in arrived.values()) and not dist.is_initialized()
    seen = [*store.list_keys(), *(store.get(key) for key in store.list_keys())]
    assert len(seen) == 6 and not [text for text in map(str, seen) if rendezvous.key in text], "the key is in no store"


def test_a_member_that_others_put_into_the_store_is_refused() -> None:
    """Another user's address in place of a worker's: the trainer would send it the weights."""
    store = open_store("127.0.0.1", 10.0)
    store.set("weights 1/0/1", b"an address of somebody else")
    with pytest.raises(RuntimeError, match="weights 1/0/1: a value that was not written by this run"):
        WeightGroup(store, make_rendezvous(store.port, 2), 0, CPU)


def listening_only_on_loopback(port: int) -> bool:
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")} == {f"0100007F:{port:04X}"}


def own_listeners() -> set[int]:
    """Return the ports that this process listens on."""
    own = {os.readlink(descriptor) for descriptor in Path("/proc/self/fd").iterdir() if descriptor.is_symlink()}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own}


def test_who_connects_in_a_workers_place_gets_no_weights() -> None:
    """gloo takes who comes first, with the number of the connection, which counts from 0; the proof does not.

    Either no group comes about, or, where the strangers came too late, one of the two members alone, which works.
    """
    store = open_store("127.0.0.1", 10.0)
    rendezvous = make_rendezvous(store.port, 2, join_timeout_s=3.0, broadcast_timeout_s=3.0)
    before, data = own_listeners(), [torch.arange(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)]
    ended: dict[int, str] = {}

    def join(rank: int) -> None:
        try:
            group = WeightGroup(store if rank == 0 else join_store(rendezvous), rendezvous, rank, CPU)
        except RuntimeError as error:
            ended[rank] = f"no group: {error}"
            return
        group.broadcast(data[rank])
        ended[rank] = "sent"

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
    threads[0].start()
    while not own_listeners() - before:
        time.sleep(0.01)
    (port,) = own_listeners() - before
    strangers = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(4)]
    for number, stranger in enumerate(strangers):
        stranger.sendall(struct.pack("<q", number))
    time.sleep(0.2)
    threads[1].start()
    for thread in threads:
        thread.join()
    for stranger in strangers:
        stranger.close()
    works = ended == {0: "sent", 1: "sent"} and torch.equal(*data)
    assert works or {text.partition(":")[0] for text in ended.values()} == {"no group"} and len(ended) == 2, ended


def test_a_member_that_does_not_come_is_an_error_within_the_deadline() -> None:
    store = open_store("127.0.0.1", 10.0)
    with pytest.raises(RuntimeError, match="(?i)time"):
        WeightGroup(store, make_rendezvous(store.port, 2, join_timeout_s=0.5), 0, CPU)


def test_a_member_that_says_nothing_is_an_error_within_the_deadline() -> None:
    store = open_store("127.0.0.1", 10.0)
    rendezvous = make_rendezvous(store.port, 2, broadcast_timeout_s=0.5)
    silent: list[WeightGroup] = []
    thread = threading.Thread(target=lambda: silent.append(WeightGroup(join_store(rendezvous), rendezvous, 0, CPU)))
    thread.start()
    group = WeightGroup(store, rendezvous, 1, CPU)
    thread.join()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="(?i)time"):
        group.broadcast(torch.zeros(8, dtype=torch.uint8))
    assert silent and time.monotonic() - start < 5


def test_the_address_is_that_of_the_route_or_of_the_interface() -> None:
    assert own_address("127.0.0.1") == own_address("localhost") == own_address("example", "lo") == "127.0.0.1"
    with pytest.raises(ValueError, match=r"rollout\.interface='none0' has no IPv4 address here.*'lo'"):
        own_address("127.0.0.1", "none0")
    with closing(KeptPort("127.0.0.1")) as kept:
        assert kept.socket.getsockname()[0] == "127.0.0.1"


def test_a_handle_survives_json() -> None:
    text = json.dumps(HANDLE.to_json())
    assert IpcHandle.from_json(json.loads(text)) == HANDLE and "00ff00ff" in text


def read_block(handle: str, answer: mp.SimpleQueue) -> None:
    """Read a block in another process, and put the bytes into the queue."""
    device = torch.device("cuda", 0)
    data = IpcHandle.from_json(json.loads(handle)).open(device).cpu()
    answer.put(data.tolist())


@pytest.mark.gpu
def test_another_process_reads_the_block_where_it_is() -> None:
    """A block with others around it in the allocator's segment; and its memory is free again afterwards."""
    device = torch.device("cuda", 0)
    before = torch.full((1000,), 7, dtype=torch.uint8, device=device)
    block = torch.arange(3000, device=device).to(torch.uint8)
    context = mp.get_context("spawn")
    answer = context.SimpleQueue()
    process = context.Process(target=read_block, args=(json.dumps(IpcHandle.of(block).to_json()), answer))
    process.start()
    assert answer.get() == block.tolist() and int(before.sum()) == 7000
    process.join()
    assert process.exitcode == 0
    del block
    torch.cuda.ipc_collect()

"""Ways of the weights from the trainer into the servers' workers.

Whatever the way, the tensors of the newest version lie in files in shared memory on the trainer's node (``weight_sync.py``): a server that is
restarted, or wakes without a sync, gets them from there again. They arrive in shared memory of the server's node, or stay in the trainer's
memory on the GPU that both use (``device_blocks.py``); names, shapes and checksums are compared before the old weights are touched.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import torch

from hetero_ppo.config.schema import WeightTransfer
from hetero_ppo.network import LOOPBACK
from hetero_ppo.rollout.servers.client import ServerClient, ServerDied
from hetero_ppo.rollout.servers.worker_calls import call_workers
from hetero_ppo.rollout.weights.cuda_ipc import IpcHandle, device_id
from hetero_ppo.rollout.weights.device_blocks import DeviceBlocks
from hetero_ppo.rollout.weights.signed_store import derived_key, new_secret
from hetero_ppo.rollout.weights.weight_group import Meeting, Shard, WeightGroup, map_shard, open_store
from hetero_ppo.rollout.weights.weight_sync import PinnedStaging, WeightFiles

#: Workers come at once, or not at all.
MEETING_TIMEOUT_S = 30.0


class WeightTransport(Protocol):
    """All methods run on the pool's event loop."""

    #: True: servers read the files themselves; False: they keep what :meth:`deliver` brought them.
    reads_files: bool
    #: True: it takes the blocks of a sync with :meth:`keep`.
    keeps_blocks: bool

    def keep(self, block: Shard) -> None:
        """Takes a block of the sync that is under way."""

    def checksums(self, files: WeightFiles) -> dict[str, str]:
        """Tensor name -> what the servers' own checksums have to be."""

    def release(self) -> None:
        """Lets go of what only the servers needed that have loaded by now."""

    async def deliver(self, clients: list[ServerClient], files: WeightFiles) -> dict[int, ServerDied]:
        """Brings the tensors to servers; their weights stay as they are.

        Returns:
            Position in ``clients`` -> why, for every server that died under it; empty when all servers have all tensors.

        Raises:
            RuntimeError: a server that is alive did not get them in time.
        """


class OfFiles:
    """Base of the transports that send the bytes of the weight files."""

    keeps_blocks = False

    def keep(self, block: Shard) -> None:
        raise AssertionError("this way of the weights takes no blocks")

    def checksums(self, files: WeightFiles) -> dict[str, str]:
        return files.checksums

    def release(self) -> None: ...


class SharedMemory(OfFiles):
    """The servers are on the trainer's node and read the files."""

    reads_files = True

    async def deliver(self, clients: list[ServerClient], files: WeightFiles) -> dict[int, ServerDied]:
        return {}


class Broadcast(OfFiles):
    """One shard after the other through the memory of the trainer's device, to the first worker of every server at the same time.

    Workers on other devices, and all of them on CPUs, get it by a broadcast in a group of their own with the trainer. A worker on the
    trainer's own GPU, which NCCL would not take twice, reads it where it is (CUDA IPC). Each passes it on to the others of its server
    by a file in shared memory.

    Args:
        device: the trainer's: a CPU for gloo.
        address: of this node, that the workers reach; their meeting point listens there alone.
        timeout_s: deadline of a meeting, and of every shard.
    """

    reads_files = False

    def __init__(self, device: torch.device, address: str, timeout_s: float):
        self.device = device
        self.address = address
        self.timeout_s = timeout_s
        self._secret = new_secret()
        self._store = open_store(address, timeout_s)
        self._group: WeightGroup | None = None
        self._members: list[tuple[int, int]] = []  # (server, its start) of the group
        self._num_meetings = 0
        self._ranks: list[int | None] = []  # in the group, of each of its servers; None: it reads the trainer's memory
        self._lock = asyncio.Lock()

    async def deliver(self, clients: list[ServerClient], files: WeightFiles) -> dict[int, ServerDied]:
        async with self._lock:  # two servers may be restarted at the same time
            died = await self._meet(clients)
            for index, path in enumerate(files.paths):
                if died:
                    break
                shard = await asyncio.to_thread(self._on_device, map_shard(path))
                died = await self._send(clients, shard, index)
            if self.device.type == "cuda":
                torch.cuda.ipc_collect()  # what receivers have let go of
            if died:
                self._group, self._members = None, []  # its other members are met anew
            return died

    def _on_device(self, shard: Shard) -> Shard:
        return Shard(shard.header, shard.data.to(self.device))

    async def _meet(self, clients: list[ServerClient]) -> dict[int, ServerDied]:
        """A group with the workers of just these servers, as they are since their last start."""
        members = [(client.server.index, client.num_opened) for client in clients]
        if members == self._members:
            return {}
        self._group, self._members = None, []
        self._num_meetings += 1
        devices, died = await call_workers(clients, "hetero_ppo_device", [{}] * len(clients), self.timeout_s)
        if died:
            return died
        own, size, ranks = device_id(self.device), 1, []
        for workers in devices:
            device = workers[0]["device"]
            elsewhere = self.device.type == "cpu" or device != own
            ranks.append(size if elsewhere else None)
            size += elsewhere
        self._ranks = ranks
        if size > 1:
            died = await self._join(clients, ranks, size)
        if not died:
            self._members = members
        return died

    async def _join(self, clients: list[ServerClient], ranks: list[int | None], size: int) -> dict[int, ServerDied]:
        name = f"weights {self._num_meetings}"
        meeting = Meeting(
            host=self.address,
            port=self._store.port,
            name=name,
            key=derived_key(self._secret, name).hex(),
            size=size,
            meeting_timeout_s=min(MEETING_TIMEOUT_S, self.timeout_s),
            broadcast_timeout_s=self.timeout_s,
        )

        def join() -> None:
            self._group = WeightGroup(self._store, meeting, 0, self.device)

        arguments = [{"meeting": meeting.to_json(), "rank": rank} for rank in ranks]
        _, died = await call_workers(clients, "hetero_ppo_join", arguments, self.timeout_s, join)
        return died

    async def _send(self, clients: list[ServerClient], shard: Shard, index: int) -> dict[int, ServerDied]:
        """One shard to all; it stays where it is until every server has said that it has it."""
        arguments: list[dict[str, Any]] = []
        for rank in self._ranks:
            # A handle for each receiver: opening it counts.
            handle = IpcHandle.of(shard.data).to_json() if rank is None else None
            arguments.append({"header": shard.header, "handle": handle, "index": index})
        group = self._group
        own_part = None if group is None else lambda: group.broadcast(shard.data)
        _, died = await call_workers(clients, "hetero_ppo_receive", arguments, self.timeout_s, own_part)
        return died


def weight_transport(
    kind: WeightTransfer,
    device: torch.device,
    timeout_s: float,
    address: str = LOOPBACK,
    staging: PinnedStaging | None = None,
) -> WeightTransport:
    """The one that the config names; ``auto`` is resolved before."""
    if kind is WeightTransfer.shared_memory:
        return SharedMemory()
    if kind is WeightTransfer.cuda_ipc:
        return DeviceBlocks(device, timeout_s, staging or PinnedStaging())
    return Broadcast(device, address, timeout_s)

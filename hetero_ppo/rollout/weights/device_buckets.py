"""Weights that go from the trainer's device to the servers' devices, bucket by bucket, without crossing to a host.

With one GPU per server the buckets of a sync stay on the trainer's device until all servers have loaded:

- A worker on another GPU, and every worker on a CPU, gets each bucket by a broadcast in a process group of the trainer and one worker of
  each server. It keeps the buckets on its own device.
- NCCL does not take a GPU twice. A worker on the trainer's own GPU therefore opens the trainer's bucket (CUDA IPC).

A server of several GPUs (``rollout.tensor_parallel`` above 1) may hold a model that does not fit on one of them. There the buckets come
from the files, one at a time, and the first worker of a server passes each on to the others by a file in shared memory.

A server that is restarted, or wakes without a sync, gets buckets that are read from the files.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hetero_ppo.errors import RunError
from hetero_ppo.rollout.servers.client import ServerClient, ServerDied
from hetero_ppo.rollout.servers.worker_calls import PHASE, call_workers
from hetero_ppo.rollout.weights.bucket import Bucket, PinnedStaging, map_bucket
from hetero_ppo.rollout.weights.cuda_ipc import IpcHandle, device_id
from hetero_ppo.rollout.weights.signed_store import derived_key, new_secret
from hetero_ppo.rollout.weights.weight_group import Rendezvous, WeightGroup, open_store
from hetero_ppo.rollout.weights.weight_version import WeightVersion
from megatron_bridge.platform.copies import release_cached_memory

#: Workers join at once, or not at all.
JOIN_TIMEOUT_S = 30.0


class DeviceBuckets:
    """Sends buckets, see ``transports.WeightTransport``.

    Args:
        device: The trainer's device; a CPU sends by gloo.
        timeout_s: Deadline of every call and of every bucket, in seconds.
        staging: Pinned memory for copies from files to the device.
        address: Address of this node that the workers reach. The group's store listens there alone.
        sends_buckets: Whether the buckets of a sync are sent and stay on the workers' devices. False: servers have several GPUs.
        own_device_only: Whether a worker on another device is an error (``rollout.weight_transfer=cuda_ipc``).
    """

    reads_files = False

    def __init__(
        self,
        device: torch.device,
        timeout_s: float,
        staging: PinnedStaging,
        *,
        address: str,
        sends_buckets: bool,
        own_device_only: bool,
    ):
        self.device = device
        self.timeout_s = timeout_s
        self.staging = staging
        self.address = address
        self.sends_buckets = sends_buckets
        self.own_device_only = own_device_only
        self._secret = new_secret()
        self._store: dist.TCPStore | None = None  # opened for the first group
        self._group: WeightGroup | None = None
        self._members: list[tuple[int, int]] = []  # (server, its start) of those that ``_ranks`` is about
        self._ranks: list[int | None] = []  # each server's rank in the group; None: it opens the trainer's buckets
        self._num_groups = 0
        self._lock = asyncio.Lock()

    def release(self, weights: WeightVersion) -> None:
        """Free the buckets of a version, and give their memory to the driver: the server takes that of its KV cache next."""
        weights.buckets.clear()
        if self.device.type == "cuda":
            torch.cuda.ipc_collect()  # frees buckets that receivers have closed
            release_cached_memory()

    async def deliver(self, clients: list[ServerClient], weights: WeightVersion) -> dict[int, ServerDied]:
        """Send every bucket to all servers; see ``WeightTransport.deliver``."""
        async with self._lock:  # two servers may be restarted at the same time
            died = await self._rendezvous(clients)
            index = 0
            async for bucket in self._buckets_of(weights):
                if died:
                    break
                died = await self._send(clients, weights.target, bucket, index)
                index += 1
            if self.device.type == "cuda":
                torch.cuda.ipc_collect()
            if died:
                self._group, self._members = None, []  # the other members join a new group
            return died

    async def _buckets_of(self, weights: WeightVersion) -> AsyncIterator[Bucket]:
        """Yield the buckets of a version on the trainer's device; those that stay there are kept in the version."""
        if self.sends_buckets:
            if not weights.buckets:
                uploaded = [await asyncio.to_thread(self._upload, path) for path in weights.paths]
                weights.buckets.extend(uploaded)
            for bucket in tuple(weights.buckets):  # another server's restart may release them meanwhile
                yield bucket
        else:
            for path in weights.paths:
                yield await asyncio.to_thread(self._upload, path)

    def _upload(self, path: Path) -> Bucket:
        """Copy a file's bucket to the device through pinned memory. On a CPU the mapped file is used as it is."""
        bucket = map_bucket(path)
        if self.device.type == "cpu":
            return bucket
        pinned = self.staging.take(bucket.data.numel())
        pinned.copy_(bucket.data)
        return Bucket(bucket.header, pinned.to(self.device, copy=True))

    async def _rendezvous(self, clients: list[ServerClient]) -> dict[int, ServerDied]:
        """Make a group with the workers of exactly these servers, as they are since their last start."""
        members = [(client.server.index, client.num_opened) for client in clients]
        if members == self._members:
            return {}
        self._group, self._members = None, []
        devices, died = await call_workers(clients, "hetero_ppo_device", [{}] * len(clients), self.timeout_s)
        if died:
            return died
        size, self._ranks = 1, []
        for client, workers in zip(clients, devices, strict=True):
            joins = self._must_join(client.server.name, workers[0]["device"])
            self._ranks.append(size if joins else None)
            size += joins
        if size > 1:
            died = await self._join(clients, size)
        if not died:
            self._members = members
        return died

    def _must_join(self, server: str, device: str) -> bool:
        """Return whether a worker needs the broadcast. False: it opens the trainer's buckets.

        Raises:
            RunError: Only the trainer's device is allowed, and the worker is on another one.
        """
        own = device_id(self.device)
        if not self.own_device_only:
            return self.device.type == "cpu" or device != own
        if device != own:
            raise RunError(
                f"{PHASE}: rollout.weight_transfer=cuda_ipc: {server} is on the device {device}, the trainer on {own}; use collective"
            )
        return False

    async def _join(self, clients: list[ServerClient], size: int) -> dict[int, ServerDied]:
        """Let the workers join a new group of ``size`` members."""
        if self._store is None:
            self._store = open_store(self.address, self.timeout_s)
        store = self._store
        self._num_groups += 1
        name = f"weights {self._num_groups}"
        rendezvous = Rendezvous(
            host=self.address,
            port=store.port,
            name=name,
            key=derived_key(self._secret, name).hex(),
            size=size,
            join_timeout_s=min(JOIN_TIMEOUT_S, self.timeout_s),
            broadcast_timeout_s=self.timeout_s,
        )

        def join() -> None:
            self._group = WeightGroup(store, rendezvous, 0, self.device)

        arguments = [{"rendezvous": rendezvous.to_json(), "rank": rank} for rank in self._ranks]
        _, died = await call_workers(clients, "hetero_ppo_join", arguments, self.timeout_s, join)
        return died

    async def _send(
        self, clients: list[ServerClient], target: str, bucket: Bucket, index: int
    ) -> dict[int, ServerDied]:
        """Send one bucket to all servers. It must stay where it is until this returns, and until they have loaded if they open it."""
        arguments: list[dict[str, Any]] = []
        for rank in self._ranks:
            # torch counts how often a handle is opened, so every receiver has its own.
            handle = IpcHandle.of(bucket.data).to_json() if rank is None else None
            arguments.append({"target": target, "header": bucket.header, "handle": handle, "index": index})
        group = self._group
        own_part = None if group is None else lambda: group.broadcast(bucket.data)
        _, died = await call_workers(clients, "hetero_ppo_receive", arguments, self.timeout_s, own_part)
        return died

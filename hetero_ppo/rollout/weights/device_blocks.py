"""Weights that the server's worker loads from where they are: blocks of the trainer's memory on the GPU that both use (CUDA IPC).

A weight sync packs the tensors into blocks on the device as they come, and copies each block to the files in shared memory: the one time that
weights cross to the host. The worker opens the blocks, compares names, shapes and checksums, and loads from them; nothing is copied to
the server's host memory. The blocks stay until it has loaded. A server that is restarted, or wakes without a sync, gets blocks that are
made of the files.
"""

from __future__ import annotations

import asyncio

import torch

from hetero_ppo.errors import RunError
from hetero_ppo.rollout.servers.client import ServerClient, ServerDied
from hetero_ppo.rollout.servers.worker_calls import PHASE, call_workers
from hetero_ppo.rollout.weights.cuda_ipc import IpcHandle, device_id
from hetero_ppo.rollout.weights.tensor_bytes import lane_checksum
from hetero_ppo.rollout.weights.weight_group import Shard, map_shard
from hetero_ppo.rollout.weights.weight_sync import PinnedStaging, WeightFiles
from megatron_bridge.platform.copies import release_cached_memory


class DeviceBlocks:
    """A transport, see ``transports.WeightTransport``, for one server of one GPU, which is the trainer's.

    Args:
        device: The trainer's GPU.
        timeout_s: Deadline of every call.
        staging: Pinned memory that the bytes of files cross by.
    """

    reads_files = False
    keeps_blocks = True

    def __init__(self, device: torch.device, timeout_s: float, staging: PinnedStaging):
        self.device = device
        self.staging = staging
        self.timeout_s = timeout_s
        self._blocks: list[Shard] = []
        self._checksums: dict[str, str] = {}  # of what lies in the blocks

    def keep(self, block: Shard) -> None:
        """Take a block of the sync that is under way; ``deliver`` hands it on, ``release`` lets it go."""
        self._blocks.append(block)

    def checksums(self, files: WeightFiles) -> dict[str, str]:
        """Checksum of every tensor, as the worker computes it of the same bytes."""
        return self._checksums

    def release(self) -> None:
        """Let the blocks go: the worker has loaded them, or never will."""
        self._blocks, self._checksums = [], {}
        if self.device.type == "cuda":
            torch.cuda.ipc_collect()  # what receivers have let go of
            release_cached_memory()  # the server takes the memory of its KV cache next

    async def deliver(self, clients: list[ServerClient], files: WeightFiles) -> dict[int, ServerDied]:
        """Let the server's worker open the blocks; see ``WeightTransport.deliver``."""
        devices, died = await call_workers(clients, "hetero_ppo_device", [{}] * len(clients), self.timeout_s)
        if died:
            return died
        own = device_id(self.device)
        for client, workers in zip(clients, devices, strict=True):
            if workers[0]["device"] != own:
                raise RunError(
                    f"{PHASE}: rollout.weight_transfer=cuda_ipc: {client.server.name} is on the device {workers[0]['device']}, the trainer "
                    f"on {own}; use collective"
                )
        if not self._blocks:
            self._blocks = await asyncio.to_thread(self._from_files, files)
        tensors = {name: tensor for block in self._blocks for name, tensor in block.tensors().items()}
        if tensors.keys() != files.checksums.keys():
            raise RunError(f"{PHASE}: the blocks on the device are not those of the weights {files.version!r}")
        sums = await asyncio.to_thread(lambda: list(map(lane_checksum, tensors.values())))
        self._checksums = dict(zip(tensors, sums, strict=True))
        for index, block in enumerate(self._blocks):
            # A handle for each receiver: opening it counts.
            handles = [
                {"header": block.header, "handle": IpcHandle.of(block.data).to_json(), "index": index} for _ in clients
            ]
            _, died = await call_workers(clients, "hetero_ppo_open", handles, self.timeout_s)
            if died:
                break
        return died

    def _from_files(self, files: WeightFiles) -> list[Shard]:
        return [Shard(shard.header, self._upload(shard.data)) for shard in map(map_shard, files.paths)]

    def _upload(self, data: torch.Tensor) -> torch.Tensor:
        """Copy bytes to the device through pinned memory. Returns [bytes] uint8."""
        pinned = self.staging.take(data.numel())
        pinned.copy_(data)
        return pinned.to(self.device, copy=True)

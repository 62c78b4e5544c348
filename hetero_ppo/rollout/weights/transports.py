"""Transports: ways of the bytes of new weights from the trainer to the servers' workers.

Either the servers read files in shared memory, or they are sent buckets of the trainer's device memory (``device_buckets.py``). In both cases
the servers keep their old weights until names, shapes and checksums have been compared.
"""

from __future__ import annotations

from typing import Protocol

import torch

from hetero_ppo.config.derived import sends_buckets
from hetero_ppo.config.schema import RolloutConfig, WeightTransfer
from hetero_ppo.network import LOOPBACK
from hetero_ppo.rollout.servers.client import ServerClient, ServerDied
from hetero_ppo.rollout.weights.bucket import PinnedStaging
from hetero_ppo.rollout.weights.device_buckets import DeviceBuckets
from hetero_ppo.rollout.weights.weight_version import WeightVersion


class WeightTransport(Protocol):
    """Brings the tensors of a version to servers. All methods run on the pool's event loop."""

    #: Whether servers read the files themselves. False: they keep what :meth:`deliver` brought them.
    reads_files: bool
    #: Whether it sends the buckets of a version. False: it needs the files.
    sends_buckets: bool

    def release(self, weights: WeightVersion) -> None:
        """Free the buckets of a version, because the servers have loaded them or never will."""

    async def deliver(self, clients: list[ServerClient], weights: WeightVersion) -> dict[int, ServerDied]:
        """Send the tensors to servers. Their weights stay as they are.

        Returns:
            Position in ``clients`` -> error, for every server that died meanwhile. Where it is empty, all servers have all tensors.

        Raises:
            RuntimeError: A server that is alive did not get them in time.
        """


class SharedMemory:
    """The servers are on the trainer's node and read the files."""

    reads_files = True
    sends_buckets = False

    def release(self, weights: WeightVersion) -> None:
        """Free nothing: a version in files has no buckets."""

    async def deliver(self, clients: list[ServerClient], weights: WeightVersion) -> dict[int, ServerDied]:
        """Send nothing: the servers read the files when they check them."""
        return {}


def weight_transport(
    kind: WeightTransfer,
    config: RolloutConfig,
    device: torch.device,
    address: str = LOOPBACK,
    staging: PinnedStaging | None = None,
) -> WeightTransport:
    """Return the transport of a run.

    Args:
        kind: Transport that the config names; ``auto`` has been resolved.
        config: The ``rollout`` section.
        device: The trainer's device.
        address: Address of this node that the workers reach.
        staging: Pinned memory for copies between host and device. None: the transport has its own.
    """
    if kind is WeightTransfer.shared_memory:
        return SharedMemory()
    return DeviceBuckets(
        device,
        config.sync_timeout_s,
        staging or PinnedStaging(),
        address=address,
        sends_buckets=sends_buckets(kind, config),
        own_device_only=kind is WeightTransfer.cuda_ipc,
    )

"""The generator's share of the plan."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hetero_ppo.config.derived import (
    actor_generates,
    keeps_weight_files,
    max_model_len,
    num_servers,
    sends_buckets,
    weight_transfer,
)
from hetero_ppo.config.devices import dtype_of
from hetero_ppo.config.schema import PpoConfig, RolloutConfig, WeightTransfer
from hetero_ppo.memory.plan_storage import DTYPES, RoleStorage
from hetero_ppo.step.kinds import SHARD_BYTES
from megatron_bridge.weights.parameter_count import hf_tensor_sizes

MIB = 2**20


@dataclass(frozen=True)
class GeneratorPlan:
    """Memory of the generator.

    vLLM takes ``gpu_memory_utilization`` of a device while it generates, and only its weights during a weight sync. Asleep it holds
    nothing: its weights come back from the files of the last weight sync. On a CPU its servers lie in host memory and never sleep; then
    ``awake`` is 0. An actor that is its own generator has a key-value cache, on a CPU too; its parameters are counted with its role.
    """

    awake: int  # bytes of one device
    weights: int  # bytes of one device (GPU), or of one server (CPU)
    bytes_per_token: int  # of KV cache on one device
    # bytes of rank 0's host memory at a weight sync: files of two versions, and what servers received
    weight_files: int
    # bytes of a GPU at a weight sync: tensors that are being packed, and the buckets that stay there
    sync_buckets: int
    host_bytes: int  # of all servers of the fullest node on a CPU
    sleeps: bool  # gives the device back between rollouts

    @property
    def kv_tokens(self) -> int:
        """Most tokens whose keys and values fit next to the weights; activations and graphs of vLLM take some of this space."""
        return max(0, (self.awake - self.weights) // self.bytes_per_token)


def plan_generator(
    config: PpoConfig, actor: RoleStorage, device_bytes: int | None, world_size: int, ranks_per_node: int
) -> GeneratorPlan | None:
    """Return the generator's bytes; None when recorded rollouts take its place.

    Args:
        config: Checked configuration of the run.
        actor: Role whose weights the generator runs.
        device_bytes: Memory of one device; None: a CPU.
        world_size: Number of ranks of the run.
        ranks_per_node: Number of ranks of a node; servers are spread over the nodes.
    """
    if config.train.replay_rollouts is not None:
        return None
    if actor_generates(config):
        return _plan_actor_as_generator(config.rollout, max_model_len(config), actor, device_bytes)
    rollout, num_nodes = config.rollout, math.ceil(world_size / ranks_per_node)
    element = DTYPES[rollout.dtype or dtype_of(actor.config.model)].itemsize
    whole = sum(hf_tensor_sizes(actor.bridge, actor.head).values()) * element
    dims, layers = actor.bridge.dims, actor.bridge.transformer.num_layers
    servers = num_servers(rollout, world_size)
    one_node = num_nodes == 1 or servers == 1
    transfer = weight_transfer(rollout, one_node=one_node)
    sleeps = device_bytes is not None and rollout.sleep is not False
    return GeneratorPlan(
        awake=0 if device_bytes is None else int(rollout.gpu_memory_utilization * device_bytes),
        weights=whole // rollout.tensor_parallel,
        bytes_per_token=2 * layers * dims.key * element // rollout.tensor_parallel,
        weight_files=_host_copies(rollout, transfer, math.ceil(servers / num_nodes), device_bytes, sleeps) * whole,
        sync_buckets=0
        if device_bytes is None
        else _sync_buckets(actor, element, whole, sends_buckets(transfer, rollout)),
        host_bytes=math.ceil(servers / num_nodes) * (whole + rollout.kv_cache_mib * MIB),
        sleeps=sleeps,
    )


def _host_copies(
    rollout: RolloutConfig, transfer: WeightTransfer, num_servers: int, device_bytes: int | None, sleeps: bool
) -> int:
    """Return how many copies of the weights host memory of rank 0's node has during a sync.

    Args:
        rollout: The ``rollout`` section.
        transfer: Way of the weights.
        num_servers: Servers of rank 0's node.
        device_bytes: Memory of one device. None: a CPU, whose buckets are in host memory.
        sleeps: Whether the servers sleep.
    """
    sent = sends_buckets(transfer, rollout)
    files = 2 if keeps_weight_files(rollout, sent=sent, can_sleep=sleeps) else 0
    if transfer is WeightTransfer.shared_memory or (sent and device_bytes is not None):
        return files
    return files + num_servers + sent


def _sync_buckets(actor: RoleStorage, element: int, whole: int, sent: bool) -> int:
    """Return the bytes of a GPU for the tensors of one bucket, and for it or, where buckets are sent, for all of them.

    A bucket is full when the last tensor makes it ``SHARD_BYTES`` or more.
    """
    largest = max(hf_tensor_sizes(actor.bridge, actor.head).values()) * element
    bucket = min(whole, SHARD_BYTES + largest)
    return bucket + (whole if sent else bucket)


def _plan_actor_as_generator(
    rollout: RolloutConfig, longest: int, actor: RoleStorage, device_bytes: int | None
) -> GeneratorPlan:
    """Return the plan of the cache of one data-parallel rank (``megatron_bridge.model.cached_attention.SlotCache``).

    Args:
        rollout: Section of the generator.
        longest: Tokens of the longest sequence that it takes.
        actor: Role whose parameters it reads.
        device_bytes: Memory of one device; None: a CPU.
    """
    # On a CPU attention is in float32.
    element = 4 if device_bytes is None else DTYPES[dtype_of(actor.config.model)].itemsize
    dims, layers = actor.bridge.dims, actor.bridge.transformer.num_layers
    bytes_per_token = 2 * layers * dims.key * element // actor.config.parallel.tensor
    return GeneratorPlan(
        awake=rollout.max_num_seqs * longest * bytes_per_token,
        weights=0,
        bytes_per_token=bytes_per_token,
        weight_files=0,
        sync_buckets=0,
        host_bytes=0,
        sleeps=device_bytes is not None if rollout.sleep is None else rollout.sleep,
    )

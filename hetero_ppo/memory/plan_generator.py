"""The generator's share of the plan."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hetero_ppo.config.derived import actor_generates, max_model_len, num_servers, weight_transfer
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
    weight_files: (
        int  # bytes in shared memory of rank 0's node during a sync: old and new version, and what servers received
    )
    sync_blocks: int  # bytes of a GPU during a sync: tensors that are packed into a block, and with cuda_ipc all blocks
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
    received = 0 if transfer is WeightTransfer.shared_memory else math.ceil(servers / num_nodes)
    return GeneratorPlan(
        awake=0 if device_bytes is None else int(rollout.gpu_memory_utilization * device_bytes),
        weights=whole // rollout.tensor_parallel,
        bytes_per_token=2 * layers * dims.key * element // rollout.tensor_parallel,
        weight_files=(2 + received) * whole,
        sync_blocks=0 if device_bytes is None else _sync_blocks(actor, element, whole, transfer),
        host_bytes=math.ceil(servers / num_nodes) * (whole + rollout.kv_cache_mib * MIB),
        sleeps=device_bytes is not None and rollout.sleep is not False,
    )


def _sync_blocks(actor: RoleStorage, element: int, whole: int, transfer: WeightTransfer) -> int:
    """Return the bytes of the tensors of one block, and of the block, which is full from ``SHARD_BYTES`` on."""
    largest = max(hf_tensor_sizes(actor.bridge, actor.head).values()) * element
    block = min(whole, SHARD_BYTES + largest)
    return block + (whole if transfer is WeightTransfer.cuda_ipc else block)


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
    element = (
        4 if device_bytes is None else DTYPES[dtype_of(actor.config.model)].itemsize
    )  # on a CPU attention is in float32
    dims, layers = actor.bridge.dims, actor.bridge.transformer.num_layers
    bytes_per_token = 2 * layers * dims.key * element // actor.config.parallel.tensor
    return GeneratorPlan(
        awake=rollout.max_num_seqs * longest * bytes_per_token,
        weights=0,
        bytes_per_token=bytes_per_token,
        weight_files=0,
        sync_blocks=0,
        host_bytes=0,
        sleeps=device_bytes is not None if rollout.sleep is None else rollout.sleep,
    )

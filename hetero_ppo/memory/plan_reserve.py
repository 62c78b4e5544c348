"""Memory of a CUDA device besides the run's own tensors, part by part. The numbers are estimates: no device was measured.

A user who has measured one gives it in the ``memory`` section of the configuration (docs/memory.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hetero_ppo.config.derived import data_parallel_size, num_servers, weight_transfer
from hetero_ppo.config.schema import (
    MemoryConfig,
    ParallelConfig,
    PpoMemoryConfig,
    RoleConfig,
    RolloutConfig,
    WeightTransfer,
)

MIB = 2**20
#: Workspaces of Transformer Engine: one for dense products, and one for each stream of the experts' grouped products.
TE_GROUPED_STREAMS = 4
#: Communicators of a vLLM server of several GPUs: its own of the tensor-parallel group, and torch's of the same group.
SERVER_COMMUNICATORS = 2


@dataclass(frozen=True)
class ReservePart:
    """One thing that takes memory of a device."""

    name: str
    num_bytes: int
    source: str  # how the number comes about, and the option that replaces it
    pooled: bool = False  # it lies in memory that torch's allocator of the trainer has reserved
    when: str = "always"  # or "asleep": while vLLM is not awake; "sync": in the weight sync


@dataclass(frozen=True)
class Reserve:
    """The parts of a run. Slack of the allocator depends on a phase's tensors; the others do not."""

    parts: tuple[ReservePart, ...] = ()
    slack: float = 0.0  # share of the tensors' bytes

    def of_phase(self, tensor_bytes: int, *, generator_awake: bool, syncing: bool) -> tuple[ReservePart, ...]:
        """Return the parts that count in a phase.

        Args:
            tensor_bytes: Tensors of the trainer: roles, activations, and what has come in ahead.
            generator_awake: Whether vLLM holds its share of the device, which includes its graphs.
            syncing: Whether vLLM holds only its weights.
        """
        counts = {"always": True, "asleep": not generator_awake, "sync": syncing}
        parts = tuple(part for part in self.parts if counts[part.when])
        if not self.slack:
            return parts
        source = f"estimate: {self.slack:g} of the tensors (memory.allocator_slack)"
        return (*parts, ReservePart("slack of torch's allocator", int(self.slack * tensor_bytes), source, pooled=True))


def divisions(parallel: ParallelConfig, dp: int, world_size: int) -> list[np.ndarray]:
    """Return how a role divides the world's ranks into groups: one array [groups, ranks of a group] for each kind of group.

    The same groups as ``distributed.groups.role_groups`` makes; a test compares them.
    """
    grid = np.arange(world_size).reshape(parallel.pipeline, dp, parallel.context, parallel.tensor)
    axes = {"pp": 0, "dp": 1, "cp": 2, "tp": 3}

    def groups(ranks: np.ndarray, *dims: int) -> np.ndarray:
        others = [axis for axis in range(ranks.ndim) if axis not in dims]
        size = int(np.prod([ranks.shape[axis] for axis in dims]))
        return np.sort(ranks.transpose(*others, *dims).reshape(-1, size), axis=1)

    names = (("tp",), ("cp",), ("dp",), ("pp",), ("tp", "pp"), ("tp", "cp"), ("cp", "dp"), ("tp", "cp", "dp"))
    found = [groups(grid, *(axes[name] for name in dims)) for dims in names]
    if parallel.expert > 1:
        experts = np.arange(world_size).reshape(parallel.pipeline, -1, parallel.expert)  # pp, dp, ep
        found += [groups(experts, *dims) for dims in ((2,), (2, 0), (1,))]
    if parallel.pipeline > 1:  # tied embeddings lie on the first and the last stage
        stages = grid.reshape(parallel.pipeline, -1)
        found.append(np.stack([stages[0], stages[-1]], axis=1))
    return found


def num_communicators(roles: Mapping[str, RoleConfig], world_size: int) -> int:
    """Return how many NCCL communicators a rank has at most: the world's, and one for each group of several ranks. Roles share them."""
    if world_size == 1:
        return 0
    kinds = {
        (ranks.shape, ranks[ranks[:, 0].argsort()].tobytes())
        for name, role in roles.items()
        for ranks in divisions(role.parallel, data_parallel_size(name, role.parallel, world_size), world_size)
        if ranks.shape[1] > 1
    }
    return 1 + len(kinds)


def plan_reserve(
    memory: MemoryConfig,
    roles: Mapping[str, RoleConfig],
    world_size: int,
    *,
    has_experts: bool,
    servers: Sequence[ReservePart] = (),
) -> Reserve:
    """Return what a CUDA device holds besides tensors.

    Args:
        memory: Section with the sizes.
        roles: Sections of the run's roles, by name.
        world_size: Number of ranks of the run.
        has_experts: Whether a role has expert layers.
        servers: Parts of the vLLM servers on the device (``server_parts``); empty where there are none.
    """
    te = memory.te_workspace_mib * (1 + TE_GROUPED_STREAMS * has_experts)
    parts = [
        _part("the trainer's CUDA context", memory.context_mib, "estimate: memory.context_mib"),
        _communicators("the trainer's NCCL communicators", num_communicators(roles, world_size), memory),
        replace(
            _part("cuBLAS workspaces", memory.cublas_mib, "2 threads x 8 x 4 MiB (memory.cublas_mib)"), pooled=True
        ),
        replace(
            _part("Transformer Engine's workspaces", te, "where it is installed (memory.te_workspace_mib)"), pooled=True
        ),
    ]
    return Reserve(tuple(part for part in [*parts, *servers] if part.num_bytes), memory.allocator_slack)


def server_parts(
    rollout: RolloutConfig, memory: PpoMemoryConfig, world_size: int, *, one_node: bool
) -> Sequence[ReservePart]:
    """Return what a vLLM server holds besides its share of the device, which it computes after context and communicators are there.

    Args:
        rollout: Section of the servers.
        memory: Section with the sizes.
        world_size: Number of ranks of the run.
        one_node: Whether all ranks are on one node.
    """
    few_nodes = one_node or num_servers(rollout, world_size) == 1
    joins = weight_transfer(rollout, one_node=few_nodes) is WeightTransfer.collective
    own = SERVER_COMMUNICATORS if rollout.tensor_parallel > 1 else 0
    graphs = _part(
        "vLLM's CUDA graphs, which it keeps asleep", memory.engine_graphs_mib, "estimate: memory.engine_graphs_mib"
    )
    runtime = _part(
        "what vLLM's weights wake with them", memory.engine_runtime_mib, "estimate: memory.engine_runtime_mib"
    )
    return [
        _part("vLLM's CUDA context", memory.context_mib, "estimate: memory.context_mib"),
        _communicators("vLLM's NCCL communicators", own + joins, memory),
        _communicators("the weight group, trainer's end", int(joins), memory),
        replace(graphs, when="asleep"),
        replace(runtime, when="sync"),
    ]


def _part(name: str, mib: float, source: str) -> ReservePart:
    return ReservePart(name, int(mib * MIB), source)


def _communicators(name: str, count: int, memory: MemoryConfig) -> ReservePart:
    source = f"estimate: {count} x {memory.nccl_channels} channels x {memory.nccl_channel_mib:g} MiB (memory.nccl_*)"
    return _part(name, count * memory.nccl_channels * memory.nccl_channel_mib, source)

"""Process groups of a role: one ProcessGroupCollection for each role, over the ranks that it lives on.

Megatron-Core's global accessors (``parallel_state.get_*``) know one layout for the whole process. Here every role has a layout of its
own, so its groups are built on a HyperCommGrid and passed as arguments.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection

from hetero_ppo.config.derived import data_parallel_size
from hetero_ppo.config.schema import ParallelConfig
from hetero_ppo.distributed.world import open_store, require_one_key, run_key
from hetero_ppo.network import keep_collectives_inside
from hetero_ppo.peer_proof import prove_peers
from megatron_bridge import platform


def initialise(timeout_minutes: float) -> dist.ProcessGroup:
    """Join the world that torchrun describes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), with a deadline on collectives.

    Ranks of one node listen on loopback alone, those of several on the interface that leads to MASTER_ADDR.

    Returns:
        The group of all ranks.

    Raises:
        RuntimeError: The process was not started by torchrun.
        RunError: A process that is not of this run takes part.
        ValueError: Nodes have different keys.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise RuntimeError(f"{', '.join(missing)} not set: start this run with torchrun, or with scripts/train_*.sh")
    if platform.HAS_CUDA:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    keep_collectives_inside(one_node=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) == world_size)
    _made.timeout = timedelta(minutes=timeout_minutes)
    _made.num_worlds += 1
    # Every world, and every start of the ranks by torchrun, has names of its own in the store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"{attempt}/{_made.num_worlds}", open_store(_made.timeout))
    _made.key = run_key()
    require_one_key(store, _made.key)
    dist.init_process_group(
        platform.distributed_backend(), store=store, rank=rank, world_size=world_size, timeout=_made.timeout
    )
    world = dist.group.WORLD
    assert world is not None  # init_process_group has just made it
    _prove(world, "the world")
    # Scratch memory of sequence-parallel all-gathers; the one thing in parallel_state that is not a group.
    parallel_state._set_global_memory_buffer()
    return world


def _prove(group: dist.ProcessGroup, name: str) -> None:
    """Check that the members of a new group are of this run, where the run has a key."""
    if _made.key is not None:
        prove_peers(group, _made.key, f"{name} ({_made.num_worlds})")


def finish() -> None:
    """Leave the world; another one can be joined afterwards."""
    _made.forget()
    gc.collect()  # models and optimizers refer to their groups in cycles; see the note at _made
    dist.destroy_process_group()
    parallel_state.destroy_global_memory_buffer()


@dataclass
class _Made:
    """The groups that this process has made in its world."""

    world: dist.ProcessGroup | None = None
    timeout: timedelta | None = (
        None  # deadline of collectives: torch gives a new group its own default, not the world's
    )
    #: A division of ranks (the ranks of each of its groups) -> this rank's group.
    groups: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup | None] = field(default_factory=dict)
    num_worlds: int = 0  # number of worlds that this process has joined
    key: bytes | None = None  # secret of the run

    def forget(self) -> None:
        self.world = None
        self.groups.clear()


_made = _Made()
# gloo's threads still run while the interpreter shuts down. Groups that live until then sometimes end the process with SIGABRT.
atexit.register(_made.forget)


def _group(division: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
    """Return this rank's group of a division of ranks; None where the rank is in none. Collective over the world.

    Roles take turns, so roles that divide the ranks alike share the groups: each group has threads of its own with gloo, and a
    communicator with buffers on the device with NCCL.
    """
    if _made.world is not dist.group.WORLD:  # the process has joined another world since
        _made.forget()
        _made.world = dist.group.WORLD
    key = tuple(tuple(ranks) for ranks in division)
    if key not in _made.groups:
        groups = {ranks: dist.new_group(list(ranks), timeout=_made.timeout) for ranks in key}
        own = next(((ranks, group) for ranks, group in groups.items() if dist.get_rank() in ranks), None)
        if own is not None:
            _prove(own[1], f"group {len(_made.groups)} of ranks {own[0]}")
        _made.groups[key] = None if own is None else own[1]
    return _made.groups[key]


@dataclass(frozen=True)
class _Grid:
    """A role's ranks on a grid with named axes, the first axis fastest."""

    ranks: Sequence[int]  # global ranks, in the order of the grid
    sizes: Mapping[str, int]  # axis -> its length

    def group(self, *axes: str) -> dist.ProcessGroup | None:
        """Return this rank's group along some axes. Collective over the world."""
        grid = HyperCommGrid(list(self.sizes.values()), list(self.sizes))
        return _group([[self.ranks[place] for place in places] for places in grid.get_rank_enum(list(axes))])


def role_groups(
    role: str, parallel: ParallelConfig, ranks: Sequence[int] | None = None
) -> ProcessGroupCollection | None:
    """Create all groups of one role's layout. Collective over the world: every rank calls it, roles in the same order.

    The order of ranks is tp fastest, then cp, dp, pp, as in Megatron-LM's default "tp-cp-ep-dp-pp".

    Args:
        role: Name of the role, for messages.
        parallel: Layout of the role over its ranks.
        ranks: Ranks that the role lives on (``step.placement``), in ascending order; None: all ranks.

    Returns:
        The groups; None on a rank that the role does not live on.

    Raises:
        ValueError: The layout does not divide the number of ranks.
    """
    ranks = range(dist.get_world_size()) if ranks is None else ranks
    dp = data_parallel_size(role, parallel, len(ranks))
    sizes = {"tp": parallel.tensor, "cp": parallel.context, "dp": dp, "pp": parallel.pipeline}
    grid = _Grid(ranks, sizes)
    groups = ProcessGroupCollection()
    groups.tp, groups.cp, groups.dp, groups.pp = (grid.group(axis) for axis in sizes)
    groups.mp = grid.group("tp", "pp")
    groups.tp_cp = grid.group("tp", "cp")
    groups.dp_cp = grid.group("cp", "dp")
    groups.tp_dp_cp = grid.group("tp", "cp", "dp")
    groups.intra_dp_cp = groups.dp_cp
    _add_expert_groups(groups, parallel, ranks)
    groups.inter_dist_opt = None
    is_everywhere = len(ranks) == dist.get_world_size()
    groups.intra_dist_opt = dist.group.WORLD if is_everywhere else _group([ranks])
    groups.embd, groups.pos_embd = _embedding_groups(parallel, ranks)
    return groups if dist.get_rank() in ranks else None


def _add_expert_groups(groups: ProcessGroupCollection, parallel: ParallelConfig, ranks: Sequence[int]) -> None:
    """Add the groups of expert layers, which have a grid of their own over the ranks of a pipeline stage.

    Experts are spread over ``expert`` neighbours, and every block of neighbours is a replica. No expert is divided over ranks.
    """
    solo = _group([[rank] for rank in ranks])
    groups.expt_tp = solo
    if parallel.expert == 1:
        groups.ep, groups.tp_ep, groups.tp_ep_pp, groups.expt_dp = solo, solo, groups.pp, groups.tp_dp_cp
    else:
        replicas = len(ranks) // (parallel.pipeline * parallel.expert)
        grid = _Grid(ranks, {"ep": parallel.expert, "dp": replicas, "pp": parallel.pipeline})
        groups.ep = grid.group("ep")
        groups.tp_ep = groups.ep
        groups.tp_ep_pp = grid.group("ep", "pp")
        groups.expt_dp = grid.group("dp")
    groups.intra_expt_dp = groups.expt_dp


def _embedding_groups(
    parallel: ParallelConfig, ranks: Sequence[int]
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """Return the group of the first and the last stage of this rank's pipeline, and that of the first stage; None outside of them.

    Tied embeddings live on both stages and their gradients are summed over the first group.
    """
    stride = len(ranks) // parallel.pipeline  # distance between two stages of one pipeline
    last = stride * (parallel.pipeline - 1)
    ends = [sorted({ranks[first], ranks[first + last]}) for first in range(stride)]
    return _group(ends), _group([[ranks[first]] for first in range(stride)])


def all_ranks(groups: ProcessGroupCollection) -> dist.ProcessGroup:
    """Return the group of all ranks that a role lives on, of which its other groups are parts."""
    return groups.intra_dist_opt


def is_last_stage(groups: ProcessGroupCollection) -> bool:
    """Return whether this rank holds the end of the model."""
    return groups.pp.rank() == groups.pp.size() - 1


def last_stage_rank(groups: ProcessGroupCollection) -> int:
    """Return the global rank of the last stage of this rank's pipeline."""
    return dist.get_process_group_ranks(groups.pp)[-1]

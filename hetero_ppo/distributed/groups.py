"""Process groups of a role: one ProcessGroupCollection for each, over the same ranks.

Megatron-Core's global accessors (``parallel_state.get_*``) know one layout for the whole process. Here every role has its
own, so groups are built on a HyperCommGrid and handed on as arguments.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection

from hetero_ppo.config.derived import data_parallel_size
from hetero_ppo.config.schema import ParallelConfig
from megatron_bridge import platform


def initialise(timeout_minutes: float) -> None:
    """Join the world that torchrun describes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), with a deadline on collectives.

    Raises:
        RuntimeError: not started by torchrun.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise RuntimeError(f"{', '.join(missing)} not set: start this run with torchrun, or with scripts/train_*.sh")
    if platform.HAS_CUDA:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(platform.distributed_backend(), timeout=timedelta(minutes=timeout_minutes))
    # Scratch memory of sequence-parallel all-gathers; the one thing in parallel_state that is not a group.
    parallel_state._set_global_memory_buffer()


def finish() -> None:
    """Leave the world; another one can be joined afterwards."""
    dist.destroy_process_group()
    parallel_state.destroy_global_memory_buffer()


def role_groups(role: str, parallel: ParallelConfig) -> ProcessGroupCollection:
    """Create all groups of one role's layout. Collective over the world: every rank calls it, roles in the same order.

    Rank order is tp fastest, then cp, dp, pp, as in Megatron-LM's default "tp-cp-ep-dp-pp".

    Raises:
        ValueError: the layout does not divide the world size.
    """
    world_size = dist.get_world_size()
    dp = data_parallel_size(role, parallel, world_size)
    grid = HyperCommGrid([parallel.tensor, parallel.context, dp, parallel.pipeline], ["tp", "cp", "dp", "pp"])
    groups = ProcessGroupCollection()
    groups.tp = grid.create_pg("tp")
    groups.cp = grid.create_pg("cp")
    groups.dp = grid.create_pg("dp")
    groups.pp = grid.create_pg("pp")
    groups.mp = grid.create_pg(["tp", "pp"])
    groups.tp_cp = grid.create_pg(["tp", "cp"])
    groups.dp_cp = grid.create_pg(["cp", "dp"])
    groups.tp_dp_cp = grid.create_pg(["tp", "cp", "dp"])
    groups.intra_dp_cp = groups.dp_cp
    _add_expert_groups(groups, parallel, world_size)
    groups.inter_dist_opt = None
    groups.intra_dist_opt = dist.group.WORLD
    groups.embd, groups.pos_embd = _embedding_groups(parallel, dp)
    return groups


def _add_expert_groups(groups: ProcessGroupCollection, parallel: ParallelConfig, world_size: int) -> None:
    """Expert layers have a grid of their own over the ranks of a pipeline stage: experts are spread over ``expert`` neighbours,
    and every block of neighbours is a replica. No expert is divided over ranks.
    """
    solo = [dist.new_group([rank]) for rank in range(world_size)][dist.get_rank()]
    groups.expt_tp = solo
    if parallel.expert == 1:
        groups.ep, groups.tp_ep, groups.tp_ep_pp, groups.expt_dp = solo, solo, groups.pp, groups.tp_dp_cp
    else:
        replicas = world_size // (parallel.pipeline * parallel.expert)
        grid = HyperCommGrid([parallel.expert, replicas, parallel.pipeline], ["ep", "dp", "pp"])
        groups.ep = grid.create_pg("ep")
        groups.tp_ep = groups.ep
        groups.tp_ep_pp = grid.create_pg(["ep", "pp"])
        groups.expt_dp = grid.create_pg("dp")
    groups.intra_expt_dp = groups.expt_dp


def _embedding_groups(parallel: ParallelConfig, dp: int) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """(first and last pipeline stage, first stage) of this rank's pipeline; None on ranks outside them.

    Tied embeddings live on both stages and their gradients are summed over the first group.
    """
    rank = dist.get_rank()
    stride = parallel.tensor * parallel.context * dp  # distance between two stages of one pipeline
    embd = pos_embd = None
    for first in range(stride):
        last = first + stride * (parallel.pipeline - 1)
        members = sorted({first, last})
        group = dist.new_group(members)
        first_group = dist.new_group([first])
        if rank in members:
            embd = group
        if rank == first:
            pos_embd = first_group
    return embd, pos_embd


def is_last_stage(groups: ProcessGroupCollection) -> bool:
    """True on the ranks that hold the end of the model."""
    return groups.pp.rank() == groups.pp.size() - 1


def last_stage_rank(groups: ProcessGroupCollection) -> int:
    """Global rank of the last stage of this rank's pipeline."""
    return dist.get_process_group_ranks(groups.pp)[-1]

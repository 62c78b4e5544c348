"""Refuse a run that cannot fit, and name the cheapest change that makes it fit."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hetero_ppo.config.checks import check_config
from hetero_ppo.config.derived import (
    actor_generates,
    config_roles,
    data_parallel_size,
    longest_sequence,
    trained_roles,
)
from hetero_ppo.config.load import AnyConfig
from hetero_ppo.config.schema import PpoConfig, RoleConfig
from hetero_ppo.memory.plan import GIB, MemoryPlan, PhasePlan, plan_memory
from hetero_ppo.memory.plan_limits import Excess, Limits, find_excess, find_limits

MAX_TENSOR = 8  # ranks that NVLink joins
UTILIZATION_STEP = 0.05


@dataclass(frozen=True)
class Change:
    """Other values for fields of a configuration."""

    fields: tuple[tuple[str, Any], ...]  # (dotted name, value)

    def describe(self) -> str:
        """Return the fields as a command line takes them."""
        return " ".join(
            f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in self.fields
        )

    def apply(self, config: AnyConfig) -> AnyConfig:
        """Return a changed copy."""
        changed = copy.deepcopy(config)
        for name, value in self.fields:
            *path, last = name.split(".")
            section: Any = changed
            for part in path:
                section = section[int(part)] if isinstance(section, list) else vars(section)[part]
            assert last in vars(section), f"no field {name}"
            setattr(section, last, value)
        return changed


def check_fits(
    config: AnyConfig,
    world_size: int,
    *,
    ranks_per_node: int | None = None,
    device_gib: float | None = None,
    host_gib: float | None = None,
) -> MemoryPlan:
    """Return the plan of a run, and refuse a run that does not fit the machine.

    Args:
        config: Checked configuration of the run.
        world_size: Number of ranks of the run.
        ranks_per_node: Number of ranks of a node; None: torchrun's LOCAL_WORLD_SIZE, else at most ``plan.DEFAULT_RANKS_PER_NODE``.
        device_gib: Memory of one device in GiB; None: ``residency.device_gib``, else the machine's.
        host_gib: Memory of one node in GiB; None: ``residency.host_gib``, else the machine's.

    Raises:
        ValueError: The run does not fit; the message names the phase, the roles, how much it is over, and the cheapest change.
    """
    limits = find_limits(config.residency, device_gib, host_gib)
    local_ranks = ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or None
    plan = plan_memory(config, world_size, ranks_per_node=local_ranks, device_bytes=limits.device)
    require_fit(config, plan, limits)
    return plan


def require_fit(config: AnyConfig, plan: MemoryPlan, limits: Limits) -> None:
    """Raise the ValueError of ``check_fits`` for a plan that breaks a limit."""
    excess = find_excess(plan, limits)
    if excess is not None:
        raise ValueError(f"the run does not fit: {excess.describe()}; {_advice(config, plan, limits, excess)}")


def _advice(config: AnyConfig, plan: MemoryPlan, limits: Limits, excess: Excess) -> str:
    """Return the cheapest change that is enough, else a few that are enough together."""
    kept: list[Change] = []
    best = plan
    for change in candidate_changes(config, plan, limits, excess):
        after = _replan([change], config, plan, limits)
        if after is None:
            continue
        if find_excess(after, limits) is None:
            return f"the cheapest change: {_bring([change], plan, after, excess)}"
        both = _replan([*kept, change], config, plan, limits)
        if both is None or _overflow(both, limits) >= _overflow(best, limits):
            continue
        kept, best = [*kept, change], both
        if find_excess(best, limits) is None:
            kept, best = _without_needless(kept, best, config, plan, limits)
            return f"no single change is enough, these together are: {_bring(kept, plan, best, excess)}"
    if excess.place == "host":
        return "no change that this command knows is enough: use more nodes, or smaller models"
    return "no change that this command knows is enough: use more ranks, larger devices, or smaller models"


def _without_needless(
    changes: list[Change], after: MemoryPlan, config: AnyConfig, plan: MemoryPlan, limits: Limits
) -> tuple[list[Change], MemoryPlan]:
    """Return the changes without needless ones; the most expensive are left out first."""
    for change in reversed(changes):
        fewer = [other for other in changes if other is not change]
        replanned = _replan(fewer, config, plan, limits)
        if replanned is not None and find_excess(replanned, limits) is None:
            changes, after = fewer, replanned
    return changes, after


def _overflow(plan: MemoryPlan, limits: Limits) -> int:
    """Return the bytes over the limits, all phases and places together; every change has to make them fewer."""
    over = max(0, plan.host.total - limits.host)
    if limits.device is not None:
        over += sum(max(0, phase.total - limits.device) for phase in plan.phases)
    return over


def _bring(changes: list[Change], before: MemoryPlan, after: MemoryPlan, excess: Excess) -> str:
    where, sizes = "the fullest device", (after.peak.total, before.peak.total)
    if excess.place == "host":
        where, sizes = "host memory of a node", (after.host.total, before.host.total)
    elif excess.place == "generator" and after.generator is not None and before.generator is not None:
        where, sizes = "the generator's share", (after.generator.awake, before.generator.awake)
    return f"{joined(changes).describe()} ({where} then holds {sizes[0] / GIB:.2f} GiB instead of {sizes[1] / GIB:.2f})"


def joined(changes: list[Change]) -> Change:
    """Return all changes as one; a field gets the value of the last change that names it."""
    return Change(tuple({name: value for change in changes for name, value in change.fields}.items()))


def _replan(changes: list[Change], config: AnyConfig, plan: MemoryPlan, limits: Limits) -> MemoryPlan | None:
    """Return the plan with these changes; None where the checks or the model refuse them."""
    changed = joined(changes).apply(config)
    try:
        check_config(changed, plan.world_size)
        return plan_memory(changed, plan.world_size, ranks_per_node=plan.ranks_per_node, device_bytes=limits.device)
    except ValueError:
        return None


def candidate_changes(config: AnyConfig, plan: MemoryPlan, limits: Limits, excess: Excess) -> Iterator[Change]:
    """Yield changes that may help, the cheapest first.

    Sharding the optimizer costs next to nothing. Offloading costs the copies. A smaller share of the generator makes rollouts slower,
    and so do forwards that wait for them. Smaller micro-batches and recomputation make training slower. More tensor-parallel ranks cost
    communication in every layer, and more pipeline-parallel ranks cost bubbles, most of all in a trained role.
    """
    roles, trained = config_roles(config), trained_roles(config)
    over = [] if limits.device is None else [phase for phase in plan.phases if phase.total > limits.device]
    concerned = [name for name in roles if name in excess.roles or any(name in phase.roles for phase in over)]
    for name in concerned:
        layout = roles[name].parallel
        shards = data_parallel_size(name, layout, plan.world_size) * layout.context
        if name in trained and not trained[name].optimizer.distributed and shards > 1:
            yield Change(((f"{name}.optimizer.distributed", True),))
    if config.residency is not None and config.residency.offload is (excess.place == "host"):
        yield Change((("residency.offload", excess.place != "host"),))
    if isinstance(config, PpoConfig):
        yield from _generator_changes(config, over, limits, excess)
    for name in dict.fromkeys(phase.computing for phase in over if phase.computing is not None):
        yield from _micro_batch_changes(name, roles[name], longest_sequence(config, name)[0])
        if name in trained:
            for recompute in {None: ("selective", "full"), "selective": ("full",), "full": ()}[trained[name].recompute]:
                yield Change(((f"{name}.recompute", recompute),))
    for name in sorted(concerned, key=lambda name: name in trained):
        yield from _layout_changes(name, roles[name], plan.world_size)


def _generator_changes(config: PpoConfig, over: list[PhasePlan], limits: Limits, excess: Excess) -> Iterator[Change]:
    if actor_generates(config):
        size = config.rollout.max_num_seqs
        while size > 1:
            size //= 2
            yield Change((("rollout.max_num_seqs", size),))
        return
    share, field = config.rollout.gpu_memory_utilization, "rollout.gpu_memory_utilization"
    if excess.place == "generator":
        while share + UTILIZATION_STEP <= 0.95:
            share = round(share + UTILIZATION_STEP, 2)
            yield Change(((field, share),))
    beside = [phase for phase in over if phase.generator and phase.phase != "weight_sync"]
    if beside and limits.device is not None:
        fitting = share - (max(phase.total for phase in beside) - limits.device) / limits.device
        lower = round(math.floor(fitting / UTILIZATION_STEP) * UTILIZATION_STEP, 2)
        if lower > 0:
            yield Change(((field, lower),))
    if config.pipeline.overlap and any(phase.phase != "rollout" for phase in beside):
        yield Change((("pipeline.overlap", False),))
    if excess.place == "generator" or any(phase.phase == "weight_sync" for phase in over):
        yield Change((("rollout.tensor_parallel", 2 * config.rollout.tensor_parallel),))


def _micro_batch_changes(name: str, role: RoleConfig, longest: int) -> Iterator[Change]:
    for field, tokens in role.token_budgets().items():
        while tokens is not None and tokens // 2 >= longest:
            tokens //= 2
            yield Change(((f"{name}.{field}", tokens),))
    size = role.micro_batch_size if role.micro_batch_tokens is None else 1
    while size > 1:
        size //= 2
        yield Change(((f"{name}.micro_batch_size", size),))


def _layout_changes(name: str, role: RoleConfig, world_size: int) -> Iterator[Change]:
    tensor, pipeline = role.parallel.tensor, role.parallel.pipeline
    while 2 * tensor <= min(MAX_TENSOR, world_size):
        tensor *= 2
        yield Change(((f"{name}.parallel.tensor", tensor), (f"{name}.parallel.sequence", True)))
    while 2 * pipeline <= world_size:
        pipeline *= 2
        yield Change(((f"{name}.parallel.pipeline", pipeline),))

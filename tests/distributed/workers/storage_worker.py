"""Builds a trained role in each of some layouts, does one optimizer step, and measures what it holds, on every rank.

Usage: see ``jobs.run_jobs``. A job: role, path, dtype, distributed, overlap, bucket_size and the layout.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from tests.distributed.workers.jobs import run_jobs
from torch import Tensor

import megatron_bridge.platform  # noqa: F401  before megatron.core
from hetero_ppo.algorithms.losses import Loss
from hetero_ppo.config.schema import DdpConfig, Dtype, ModelConfig, OptimizerConfig, ParallelConfig, TrainedRoleConfig
from hetero_ppo.engines.loss_terms import LossTerm
from hetero_ppo.engines.train_engine import TrainEngine
from hetero_ppo.memory.plan_activations import Work, kept_bytes
from hetero_ppo.memory.plan_storage import RoleStorage
from hetero_ppo.step.roles import section_of
from hetero_ppo.types import Microbatch

#: Of a micro-batch.
ROWS, LENGTH = 4, 64


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Measure this rank's parameters and its bytes by kind, and return them with the plan's."""
    config = TrainedRoleConfig(
        model=ModelConfig(path=job["path"], dtype=Dtype(job["dtype"])),
        parallel=ParallelConfig(**job["layout"]),
        micro_batch_size=ROWS,
        aligned=job.get("aligned", False),
        optimizer=OptimizerConfig(distributed=job.get("distributed", False), grad_clip=0.0),
        ddp=DdpConfig(overlap_grad_reduce=job.get("overlap", False), bucket_size=job.get("bucket_size")),
    )
    plan = RoleStorage(job["role"], config, dist.get_world_size())
    engine = TrainEngine(job["role"], config, section_of(job["role"]).head, 1)
    rows = engine.microbatches(torch.ones(8, LENGTH, dtype=torch.int64), torch.full((8,), LENGTH), None, range(8))
    engine.train_step([LossTerm(rows, squared_output, 8)])
    buffers = [buffer for chunk in engine.chunks for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]]
    parameters = [dict(chunk.named_parameters()) for chunk in engine.model.models]
    states = [state for state in optimizer_states(engine) if state]
    main_params = [
        parameter
        for group in engine.optimizer.param_groups
        for parameter in group["params"]
        if parameter.dtype is torch.float32 and job["dtype"] == "bf16"
    ]
    place = plan.place(dist.get_rank())
    work = Work(ROWS, LENGTH, 1)
    on_device, _ = engine.residency.bytes_by_kind()
    return {
        "ledger": {kind.value: size for kind, size in on_device.items()},
        "activations": kept_for_backward(engine),
        "planned_activations": kept_bytes(plan.bridge, plan.head, None, place.pp_rank, work),
        "planned_parameters": [[(p.name, p.numel) for p in chunk] for chunk in plan.parameters[place.pp_rank]],
        "parameters": [[(name, value.numel()) for name, value in chunk.items()] for chunk in parameters],
        "planned": {kind.value: size for kind, size in plan.bytes_by_kind(dist.get_rank()).items()},
        "held": {
            "params": storage_bytes(value for chunk in parameters for value in chunk.values()),
            "grads": storage_bytes(buffer.grad_data for buffer in buffers),
            "main_params": storage_bytes(main_params),
            "moments": storage_bytes(state[name] for state in states for name in ("exp_avg", "exp_avg_sq")),
        },
    }


def kept_for_backward(engine: TrainEngine) -> int:
    """Return the bytes of all storages, without parameters, that autograd keeps for one micro-batch's forward on this rank."""
    parameters = {
        parameter.untyped_storage().data_ptr() for chunk in engine.model.models for parameter in chunk.parameters()
    }
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    microbatch = Microbatch(torch.ones(ROWS, LENGTH, dtype=torch.int64), torch.full((ROWS,), LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        engine.model.run_schedule(
            engine.chunks,
            [microbatch],
            lambda output, m: (squared_output(output, m).loss, torch.tensor(1), None),
            forward_only=False,
        )
    return sum(storage.nbytes() for storage in kept.values())


def squared_output(output: Tensor, microbatch: Microbatch) -> Loss:
    """Return a loss that every parameter takes part in."""
    loss = output.float().square().sum()
    return Loss(loss, torch.tensor(output.shape[0]), {"sum": loss.detach().double()})


def optimizer_states(engine: TrainEngine) -> Iterable[dict[str, Tensor]]:
    """State of every parameter of the role's optimizers."""
    for optimizer in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
        yield from optimizer.optimizer.state.values()


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors' storages, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


if __name__ == "__main__":
    run_jobs(measure)

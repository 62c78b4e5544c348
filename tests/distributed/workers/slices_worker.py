"""Saves a role with a distributed optimizer, records what the ranks send each other, and loads it in other layouts, on every rank.

Usage: see ``jobs.run_jobs``. A job: path, dtype, folder, written (layout and buckets of the first
save), compared (whether Megatron-Core's own format must hold the same), read: name -> form of the checkpoint, layout of the load.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.distributed.workers.jobs import run_jobs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import megatron_bridge.platform  # noqa: F401  before megatron.core
from hetero_ppo.algorithms.losses import Loss
from hetero_ppo.config.schema import DdpConfig, Dtype, ModelConfig, OptimizerConfig, ParallelConfig, TrainedRoleConfig
from hetero_ppo.engines.loss_terms import LossTerm
from hetero_ppo.engines.optimizer_slices import GATHERED, SLICES
from hetero_ppo.engines.role_snapshot import RoleSnapshot
from hetero_ppo.engines.train_engine import TrainEngine
from hetero_ppo.memory.plan_storage import RoleStorage
from hetero_ppo.types import Microbatch
from megatron.core import dist_checkpointing

aten = torch.ops.aten
ROWS, LENGTH = 4, 16


class Sent(TorchDispatchMode):
    """Counts the bytes of floating-point tensors in collectives. Descriptions travel as bytes and integers."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            self.num_bytes += sum(tensor.nbytes for tensor in tensors if tensor.is_floating_point())
        return func(*args, **(kwargs or {}))


class Allocated(TorchDispatchMode):
    """Counts the bytes of new floating-point tensors."""

    ALLOCATING = frozenset(
        {
            *(aten.empty.memory_format, aten.empty_like.default, aten.zeros.default, aten.cat.default),
            *(aten.clone.default, aten.constant_pad_nd.default),
        }
    )

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in self.ALLOCATING and result.is_floating_point() and result.device.type != "meta":
            self.num_bytes += result.nbytes
        return result


def build(job: dict[str, Any], layout: dict[str, Any]) -> TrainEngine:
    layout = dict(layout)
    bucket_size = layout.pop("bucket_size", None)
    config = TrainedRoleConfig(
        model=ModelConfig(path=job["path"], dtype=Dtype(job["dtype"])),
        parallel=ParallelConfig(**layout),
        micro_batch_size=ROWS,
        optimizer=OptimizerConfig(distributed=True, lr=1e-2),
        ddp=DdpConfig(overlap_grad_reduce=bucket_size is not None, bucket_size=bucket_size),
    )
    return TrainEngine("actor", config, "lm", 10)


def step(engine: TrainEngine) -> float:
    ids = torch.randint(0, 121, (8, LENGTH), generator=torch.Generator().manual_seed(engine.steps_done))
    rows = engine.microbatches(ids, torch.full((8,), LENGTH), None, range(8))
    return engine.train_step([LossTerm(rows, squared_output, 8)]).grad_norm


def squared_output(output: Tensor, microbatch: Microbatch) -> Loss:
    loss = output.float().square().sum()
    return Loss(loss, torch.tensor(output.shape[0]), {"sum": loss.detach().double()})


def new_folder(path: Path) -> Path:
    if dist.get_rank() == 0:
        path.mkdir(parents=True)
    dist.barrier()
    return path


def save(engine: TrainEngine, folder: Path) -> Path:
    return write(engine.save(new_folder(folder)), folder)


def write(snapshot: RoleSnapshot, folder: Path) -> Path:
    assert snapshot.write()
    snapshot.finish()
    dist.barrier()
    return folder


def save_gathered(engine: TrainEngine, folder: Path) -> Path:
    """Save as older versions did, in Megatron-Core's fully_reshardable format."""
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        **engine.model.sharding_metadata,
    }
    weights = engine.model.sharded_weights()
    optimizer = engine.optimizer.sharded_state_dict(weights, is_loading=False, metadata=metadata)
    counts = {"steps_done": engine.steps_done, "skipped_in_a_row": 0}
    return write(RoleSnapshot({**weights, "optimizer": optimizer, **counts}, new_folder(folder), set()), folder)


def whole_tensors(folder: Path) -> dict[str, Tensor]:
    """Name -> whole tensor, weights and states alike, in one form for both formats."""
    tensors = dist_checkpointing.load_plain_tensors(str(folder))
    return {name.replace(GATHERED, SLICES): value for name, value in tensors.items() if isinstance(value, Tensor)}


def differing(folder: Path, expected: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors of a checkpoint that differ from ``expected``, without the rows that pad the vocabulary."""
    found = whole_tensors(folder)
    names = sorted(expected.keys() ^ found.keys())
    for name in expected.keys() & found.keys():
        rows = (
            min(len(found[name]), len(expected[name])) if "word_embeddings" in name or "output_layer" in name else None
        )
        if not torch.equal(found[name][:rows], expected[name][:rows]):
            names.append(name)
    return names


def run(job: dict[str, Any]) -> dict[str, Any]:
    folder = Path(job["folder"])
    engine = build(job, job["written"])
    for _ in range(2):
        step(engine)
    with Sent() as sent:
        snapshot = engine.save(new_folder(folder / "slices"))
    planned = RoleStorage("actor", engine.config, dist.get_world_size()).checkpoint_bytes(dist.get_rank())
    result: dict[str, Any] = {"sent": sent.num_bytes, "copied": snapshot.num_bytes, "planned": planned}
    write(snapshot, folder / "slices")
    saved = whole_tensors(folder / "slices")
    result["states"] = sum(name.startswith(SLICES) for name in saved)
    gathered = save_gathered(engine, folder / "gathered")
    if job["compared"]:
        result["beside Megatron-Core"] = differing(gathered, saved)
    following = step(engine)
    for name, (form, layout) in job["read"].items():
        other = build(job, layout)
        try:
            with Allocated() as allocated:
                other.load(folder / form)
        except ValueError as error:
            result[name] = str(error)
            continue
        result[name] = {"allocated": allocated.num_bytes, "differing": differing(save(other, folder / name), saved)}
        result[name]["parameters"] = sum(
            parameter.numel() for chunk in other.model.models for parameter in chunk.parameters()
        )
        if layout == job["written"]:
            result[name]["steps"] = [step(other), following]
    return result


if __name__ == "__main__":
    run_jobs(run)

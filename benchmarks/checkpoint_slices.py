"""Measure what a checkpoint of a role with a distributed optimizer costs, against Megatron-Core's format.

    python benchmarks/checkpoint_slices.py --nproc 4 --model 30m

Every rank saves the role, writes the copy, and loads it, once with this project's slices and once with Megatron-Core's
``fully_reshardable`` (``gathered``), which earlier versions of this project used. Each figure is the largest over the ranks:

- ``sent_mib``: floating-point tensors that go through collectives during the save;
- ``copied_mib``: what ``hetero-ppo plan`` counts as the checkpoint's copy;
- ``save_peak_mib``, ``load_peak_mib``: growth of the resident memory, at its peak, over what it was before.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
import torch.distributed as dist
from offload import MIB, SHAPES, resident_set_bytes, write_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hetero_ppo.config.schema import Dtype, ModelConfig, OptimizerConfig, ParallelConfig, TrainedRoleConfig
from hetero_ppo.distributed.groups import finish, initialise
from hetero_ppo.engines.role_reading import load_role
from hetero_ppo.engines.role_snapshot import RoleSnapshot
from hetero_ppo.engines.train_engine import TrainEngine
from hetero_ppo.table import render_table

GATHERED = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False}


class Sent(TorchDispatchMode):
    """Counter of the bytes of floating-point tensors that a rank gives to collectives and takes from them."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            self.num_bytes += sum(tensor.nbytes for tensor in tensors if tensor.is_floating_point())
        return func(*args, **(kwargs or {}))


def gathered_state(engine: TrainEngine, *, is_loading: bool) -> dict[str, Any]:
    """Return the role's state as Megatron-Core's fully_reshardable describes it."""
    weights = engine.model.sharded_weights()
    metadata = {**engine.model.sharding_metadata, **GATHERED}
    return {
        **weights,
        "optimizer": engine.optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata),
    }


def save_gathered(engine: TrainEngine, folder: Path) -> RoleSnapshot:
    """Save the role as earlier versions did."""
    live = {tensor.untyped_storage().data_ptr() for tensors in engine.tensors().values() for tensor in tensors}
    return RoleSnapshot(gathered_state(engine, is_loading=False), folder, live)


def load_gathered(engine: TrainEngine, folder: Path) -> None:
    """Load the role as earlier versions did."""
    state = load_role(gathered_state(engine, is_loading=True), folder)
    engine.model.take_weights(state)
    engine.optimizer.load_state_dict(state["optimizer"])


def peak_growth(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Run ``work``. Return its result, the MiB that the resident memory grew by at its peak, and the seconds."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before, start = resident_set_bytes(), time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return result, (int(peak.split()[1]) * 1024 - before) / MIB, seconds


def measure(model: Path, form: str, folder: Path, layout: ParallelConfig) -> dict[str, float]:
    """Measure one format on this rank.

    Args:
        model: Folder of the Hugging Face checkpoint.
        form: Name of the format, "slices" or "gathered".
        folder: Folder of the checkpoint, which does not exist yet.
        layout: Parallel layout of the role.
    """
    config = TrainedRoleConfig(
        model=ModelConfig(path=str(model), dtype=Dtype.bf16),
        parallel=layout,
        optimizer=OptimizerConfig(distributed=True),
    )
    engine = TrainEngine("actor", config, "lm", 10)
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    save = engine.save if form == "slices" else lambda path: save_gathered(engine, path)
    load = engine.load if form == "slices" else lambda path: load_gathered(engine, path)
    with Sent() as sent:
        snapshot, save_peak, save_s = peak_growth(lambda: save(folder))
    found = {
        "sent_mib": sent.num_bytes / MIB,
        "copied_mib": snapshot.num_bytes / MIB,
        "save_peak_mib": save_peak,
        "copy_s": save_s,
    }
    assert snapshot.write()
    snapshot.finish()
    del snapshot
    dist.barrier()
    _, found["load_peak_mib"], found["load_s"] = peak_growth(lambda: load(folder))
    return found


def work(args: argparse.Namespace) -> None:
    """Measure both formats on every rank. Rank 0 writes the largest figures to ``measured.json``."""
    torch.set_num_threads(1)
    initialise(10.0)
    found = {}
    for form in ("slices", "gathered"):
        measured = measure(args.folder / "model", form, args.folder / form, ParallelConfig(tensor=args.tensor))
        largest = torch.tensor([float(value) for value in measured.values()], dtype=torch.float64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        found[form] = {name: round(value, 2) for name, value in zip(measured, largest.tolist(), strict=True)}
    if dist.get_rank() == 0:
        harness.write_json(args.folder / "measured.json", found)
    finish()


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--model", choices=SHAPES, default="30m", help="size of the model")
    parser.add_argument("--nproc", type=int, default=2, help="number of ranks")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks; the others are data-parallel")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # given to the ranks
    args = parser.parse_args()
    if args.folder is not None:
        work(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(args.model, Path(folder) / "model")
        launcher = [sys.executable, "-m", "hetero_ppo.cli.launcher", "--standalone", f"--nproc-per-node={args.nproc}"]
        options = ["--model", args.model, "--tensor", str(args.tensor), "--folder", folder]
        subprocess.run([*launcher, __file__, *options], check=True)
        found = json.loads((Path(folder) / "measured.json").read_text(encoding="utf-8"))
    rows = [["", *found], *([name, *(f"{form[name]:.2f}" for form in found.values())] for name in found["slices"])]
    figures = harness.settings(args, without=["folder"]) | found
    harness.report("checkpoint_slices", figures, args.json, text=render_table(rows, "lrr"))


if __name__ == "__main__":
    main()

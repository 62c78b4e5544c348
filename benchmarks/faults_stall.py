"""Measure how long training waits for a checkpoint, with ``async_save`` and without."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

from faults_compare import records
from faults_run import Run
from ppo_step_inputs import ModelShape, Work, our_config, write_config, write_inputs

#: Shape of the two roles whose checkpoint is measured; it has 0.3 GB.
SHAPE = ModelShape("stall", 4, 512, 1536, 8, 4, 64)
STEPS = 6


def disk_gb_s(folder: Path, num_bytes: int) -> float:
    """Measure the GB/s of writing ``num_bytes`` to one file and flushing it."""
    data = os.urandom(num_bytes)
    start = time.perf_counter()
    with (folder / "rate").open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return num_bytes / (time.perf_counter() - start) / 1e9


def measure_stall(folder: Path, work: Work) -> dict[str, float]:
    """Measure the seconds that training waits for one checkpoint, and the rates of writing it.

    Args:
        folder: Folder of models and runs, which does not exist yet.
        work: Size of a step.
    """
    folder.mkdir()
    inputs = write_inputs(SHAPE, work, steps=STEPS, folder=folder)
    figures: dict[str, float] = {}
    for name, is_async in (("save_stall_s", "true"), ("save_stall_sync_s", "false")):
        run_dir = folder / name
        config = our_config(inputs, work, "fp32", STEPS, run_dir, micro_batch=4)
        config["run"] |= {"threads": 1}
        config["rollout"] = {"engine": "megatron", "max_num_seqs": 4, "sampling": config["rollout"]["sampling"]}
        config["residency"] = {"offload": True}
        config["checkpoint"] |= {"every": 2, "keep": 1}
        write_config(config, folder / "ppo.yaml")
        program = [
            "-m",
            "hetero_ppo.cli.main",
            "train",
            "--config",
            str(folder / "ppo.yaml"),
            f"checkpoint.async_save={is_async}",
        ]
        run = Run(program, 1, run_dir.with_suffix(".log"))
        if run.wait() != 0 or not run.end():
            raise RuntimeError(f"the run that measures the stall failed:\n{run.log.read_text()[-3000:]}")
        # A step's record has the seconds of the checkpoint before it, and of the check during the step whether it is written.
        seconds = [record["seconds"].get("checkpoint", 0.0) for record in records(run_dir).values()]
        figures[name] = sum(seconds) / (STEPS // 2 - 1)  # the last one is in no record
        figures[f"step_s_{name}"] = statistics.mean(record["seconds"]["total"] for record in records(run_dir).values())
        saved = run_dir / "checkpoints" / f"iter_{STEPS:07d}"
    size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    figures |= {"save_gb": size / 1e9, "save_gb_s": size / figures["save_stall_sync_s"] / 1e9}
    return figures | {"disk_gb_s": disk_gb_s(folder, size)}

"""Loads checkpoints in several layouts, runs, streams and saves them, on every rank.

Usage: see ``jobs.run_jobs``. A job: checkpoint, out, head, dtype and the layout; ranks where the role does not live on all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.distributed.workers.jobs import run_jobs

from hetero_ppo.config.schema import ParallelConfig
from hetero_ppo.distributed.groups import all_ranks, role_groups
from megatron_bridge.model.config_mapping import bridge_config, read_hf_config
from megatron_bridge.model_provider import build_model
from megatron_bridge.weights.export_hf import save_hf
from megatron_bridge.weights.import_hf import load_hf
from megatron_bridge.weights.stream import stream_hf

from tests.helpers.bridge_models import pipeline_forward, read_tensors, same_tensors, token_ids


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job. Return what this rank saw; nothing where the role does not live on it."""
    parallel = ParallelConfig(**job["layout"])
    groups = role_groups("actor", parallel, job.get("ranks"))
    if groups is None:
        return {}
    dtype = getattr(torch, job["dtype"])
    bridge = bridge_config(read_hf_config(job["checkpoint"]), dtype=dtype, **job["layout"])
    chunks = build_model(bridge, groups, head=job["head"])
    try:
        report = load_hf(chunks, bridge, job["checkpoint"], groups, head=job["head"])
    except ValueError as error:
        return {"error": str(error)}
    source = {name: tensor.to(dtype) for name, tensor in read_tensors(Path(job["checkpoint"])).items()}
    streamed = {name: tensor.clone() for name, tensor in stream_hf(chunks, bridge, groups, head=job["head"])}
    save_hf(chunks, bridge, groups, job["out"], source_dir=job["checkpoint"], head=job["head"], max_shard_bytes=60_000)
    result = {
        "loaded": report.loaded,
        "initialised": report.initialised,
        "stream_equals_source": same_tensors(source, streamed),
        "saved_when_returned": (Path(job["out"]) / "config.json").is_file(),
        "ranks": dist.get_process_group_ranks(all_ranks(groups)),
    }
    if dtype is torch.float32:
        output = pipeline_forward(chunks, token_ids(), groups, bridge.transformer.hidden_size)
        parts = [torch.empty_like(output) for _ in range(parallel.tensor)]
        dist.all_gather(parts, output, group=groups.tp)
        whole = torch.cat(parts, dim=-1)[..., : bridge.vocab_size] if job["head"] == "lm" else output
        if all_ranks(groups).rank() == 0:
            torch.save(whole, Path(job["out"]).with_suffix(".pt"))
    return result


if __name__ == "__main__":
    run_jobs(run_job)

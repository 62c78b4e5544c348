"""torchrun worker: the actor generates in several layouts.

Usage: torchrun ... generation_worker.py JOBS.json RESULTS.json. A job: name, checkpoint, layout; every rank's answers come back.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hetero_ppo.config.schema import ModelConfig, ParallelConfig, RoleConfig, RolloutConfig, SamplingConfig
from hetero_ppo.distributed.groups import finish, initialise
from hetero_ppo.engines.model_engine import ModelEngine
from hetero_ppo.rollout.megatron import MegatronEngine


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Answers of this rank: as returned, and as told of."""
    config = RoleConfig(model=ModelConfig(path=job["checkpoint"]), parallel=ParallelConfig(**job["layout"]))
    actor = ModelEngine("actor", config, "lm")
    told: list[list[int]] = []
    with MegatronEngine(RolloutConfig(max_num_seqs=3), actor, max_model_len=64, eos_token_ids=[1]) as engine:
        answers = engine.generate(
            job["prompts"],
            SamplingConfig(max_tokens=24, stop_token_ids=[2, 3, 4, 5, 6, 7, 8]),
            n=2,
            seed=11,
            on_response=lambda prompt, sample, _: told.append([prompt, sample]),
        )
        golden = engine.prompt_log_probs(job["prompts"][-1])
    return {"answers": [[vars(one) for one in group] for group in answers], "told": told, "golden": golden}


def main() -> None:
    torch.set_num_threads(1)
    initialise(timeout_minutes=2)
    results = {}
    for job in json.loads(Path(sys.argv[1]).read_text()):
        seen: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(seen, run_job(job))
        results[job["name"]] = seen
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    finish()


if __name__ == "__main__":
    main()

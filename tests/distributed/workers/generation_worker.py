"""Lets the actor generate in several layouts, on every rank.

Usage: see ``jobs.run_jobs``. A job: checkpoint, layout; every rank's answers come back.
"""

from __future__ import annotations

from typing import Any

from tests.helpers.generator_requests import ask
from tests.distributed.workers.jobs import run_jobs

from hetero_ppo.config.schema import ModelConfig, ParallelConfig, RoleConfig, RolloutConfig, SamplingConfig
from hetero_ppo.engines.model_engine import ModelEngine
from hetero_ppo.rollout.megatron import MegatronGenerator


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Generate. Return this rank's answers, as returned and as reported."""
    config = RoleConfig(model=ModelConfig(path=job["checkpoint"]), parallel=ParallelConfig(**job["layout"]))
    actor = ModelEngine("actor", config, "lm")
    reported: list[list[int]] = []
    with MegatronGenerator(RolloutConfig(max_num_seqs=3), actor, max_model_len=64, eos_token_ids=[1]) as generator:
        answers = ask(
            generator,
            job["prompts"],
            SamplingConfig(max_tokens=24, stop_token_ids=[2, 3, 4, 5, 6, 7, 8]),
            n=2,
            seed=11,
            on_response=lambda prompt, sample, _: reported.append([prompt, sample]),
        )
        probe = generator.prompt_log_probs(job["prompts"][-1])
    return {"answers": [[vars(one) for one in group] for group in answers], "reported": reported, "probe": probe}


if __name__ == "__main__":
    run_jobs(run_job)

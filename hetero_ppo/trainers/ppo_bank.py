"""A run's bank of responses: where it lies, and what decides over a step's responses."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hetero_ppo.config.schema import PpoConfig
from hetero_ppo.experience.bank import RolloutBank, bank_key
from hetero_ppo.rollout.engine import VllmEngine
from hetero_ppo.trainers.ppo_engine import RolloutEngine
from hetero_ppo.trainers.run import Run

FOLDER = "bank"


def open_bank(config: PpoConfig, run: Run, engine: RolloutEngine | None, *, resumes: bool) -> RolloutBank | None:
    """The bank, on the rank of vLLM's servers; None where nothing is banked: without checkpoints there is nothing to resume.

    Args:
        resumes: the run goes on in its own folder.
    """
    if not (run.is_writer and isinstance(engine, VllmEngine) and config.rollout.bank and config.checkpoint.every):
        return None
    return RolloutBank(run.dir / FOLDER, resumes=resumes, say=run.say)


def begin_step(
    bank: RolloutBank | None, engine: RolloutEngine | None, step: int, asked: dict[str, Any], config: PpoConfig, seed: int
) -> dict[str, Any]:
    """``bank`` and ``banked`` of the step's generation.

    Args:
        bank: None: nothing is banked.
        engine: whose weights answer.
        step: PPO steps done.
        asked: of the generation: ``prompts``, ``n``, and what else ``ppo_setup.step_prompts`` gives.
        config: of the run.
        seed: of the generation.
    """
    if bank is None:
        return {}
    assert isinstance(engine, VllmEngine)
    begun = [None if response is None else asdict(response) for response in asked.get("begun") or []]
    key = bank_key(
        weights=engine.weights_key,
        prompts=asked["prompts"].prompt_ids,
        n=asked["n"],
        begun=begun,
        wanted=asked.get("wanted"),
        sampling=asdict(config.rollout.sampling),
        seed=seed,
    )
    return {"bank": bank, "banked": bank.begin(step, key)}

"""A run's bank of responses: where it lies, and what decides over a step's responses."""

from __future__ import annotations

from dataclasses import asdict

from hetero_ppo.config.schema import PpoConfig
from hetero_ppo.experience.bank import RolloutBank, bank_key
from hetero_ppo.rollout.generator import GenerationRequest, Generator
from hetero_ppo.trainers.run import Run
from hetero_ppo.types import Response

FOLDER = "bank"


def open_bank(config: PpoConfig, run: Run, generator: Generator, *, resumes: bool) -> RolloutBank | None:
    """Return the bank on the generator's rank; None where nothing is banked: without checkpoints there is nothing to resume.

    Args:
        config: Configuration of the run.
        run: The run.
        generator: The generator.
        resumes: Whether the run continues in its own folder.
    """
    if not (
        generator.is_here and generator.capabilities.can_resume and config.rollout.bank and config.checkpoint.every
    ):
        return None
    return RolloutBank(run.dir / FOLDER, resumes=resumes)


def begin_step(
    bank: RolloutBank | None, generator: Generator, step: int, request: GenerationRequest
) -> list[tuple[int, Response]]:
    """Open the bank's file of a step, and return the responses that it has, as pairs of place and response.

    Args:
        bank: The bank; None: nothing is banked.
        generator: Generator whose weights answer.
        step: Number of PPO steps that are done.
        request: What the step asks of the generator.
    """
    if bank is None:
        return []
    partial = [None if response is None else asdict(response) for response in request.partial or []]
    key = bank_key(  # the names are those in the keys of older files
        weights=generator.weights_key,
        prompts=request.prompts.prompt_ids,
        n=request.n,
        begun=partial,
        wanted=request.num_needed,
        sampling=asdict(request.sampling),
        seed=request.seed,
    )
    return bank.begin(step, key)

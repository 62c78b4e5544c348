"""The bank of a run: responses that a resumed run does not ask for again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict

from hetero_ppo.config.schema import CheckpointConfig, RolloutConfig
from hetero_ppo.experience.bank import RolloutBank, bank_key
from hetero_ppo.rollout.generator import GenerationRequest, Generator
from hetero_ppo.trainers.run import Run
from hetero_ppo.types import Response

FOLDER = "bank"


@contextlib.contextmanager
def open_bank(
    rollout: RolloutConfig, checkpoint: CheckpointConfig, run: Run, generator: Generator
) -> Iterator[RolloutBank | None]:
    """Open the bank on the generator's rank. None where nothing is banked: without checkpoints there is nothing to resume.

    Args:
        rollout: The ``rollout`` section.
        checkpoint: The ``checkpoint`` section.
        run: Run of this process. Where it continues in its own folder, the responses that are there are kept.
        generator: Generator of this rank.
    """
    if not (generator.is_here and generator.capabilities.can_resume and rollout.bank and checkpoint.every):
        yield None
        return
    bank = RolloutBank(run.dir / FOLDER, resumes=run.continues_its_folder)
    try:
        yield bank
    finally:
        bank.end()


def begin_step(
    bank: RolloutBank | None, generator: Generator, step: int, request: GenerationRequest
) -> list[tuple[int, Response]]:
    """Open the bank's file of a step, and return the responses that it has, as pairs of place and response.

    Args:
        bank: The bank; None: nothing is banked.
        generator: Generator whose weights answer.
        step: Number of PPO steps that are done.
        request: Request of the step to the generator.
    """
    if bank is None:
        return []
    partial = [None if response is None else asdict(response) for response in request.partial or []]
    parts = {  # The key depends on these names too: with others, the files of older versions would not be found.
        "weights": generator.weights_key,
        "prompts": request.prompts.prompt_ids,
        "n": request.n,
        "begun": partial,
        "wanted": request.num_needed,
        "sampling": asdict(request.sampling),
        "seed": request.seed,
    }
    return bank.begin(step, bank_key(**parts))

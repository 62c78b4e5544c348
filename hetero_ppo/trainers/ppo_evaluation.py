"""Held-out evaluation of the policy during PPO, and dumps of what was sampled."""

from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hetero_ppo.config.schema import SamplingConfig
from hetero_ppo.disk import writing
from hetero_ppo.experience.pending_rollout import collect_rollout
from hetero_ppo.experience.rollouts import response_texts
from hetero_ppo.experience.stages import ExperienceMaker, policy_log_probs, sequence_kl
from hetero_ppo.observability.json_text import json_text
from hetero_ppo.observability.jsonl import write_whole
from hetero_ppo.reward.function import FunctionReward
from hetero_ppo.rollout.generator import GenerationRequest
from hetero_ppo.rollout.replay import write_rollouts
from hetero_ppo.step.roles import ACTOR, REFERENCE
from hetero_ppo.trainers.ppo_data import PpoData
from hetero_ppo.trainers.ppo_turns import GeneratorTurns
from hetero_ppo.trainers.run import Run
from hetero_ppo.types import Experience

log = logging.getLogger(__name__)

#: Answers that an evaluation file shows.
NUM_SAMPLES = 8
EVAL_SEED = 20_011


@dataclass(frozen=True)
class Evaluation:
    """One policy on the held-out prompts. KL and length are of the sampled answers."""

    accuracy: float | None  # mean of train.eval_function over sampled answers; None without one
    greedy_accuracy: float | None  # the same at temperature 0
    reward: float  # mean raw score of the sampled answers
    reward_parts: dict[str, float]  # means of what the scores are made of; {}: one score
    kl: float  # nats per response, to the reference
    response_length: float  # tokens
    num_prompts: int
    samples: list[dict[str, Any]]


class Evaluator:
    """Answers the held-out prompts with the generator and scores the answers.

    Args:
        run: Run of this process.
        data: Prompts of the run.
        maker: Maker of experiences, whose scorers, actor and reference are used.
        turns: Turns of the generator on the device.
        check: The ``train.eval_function``; None: there is no accuracy.
        sampling: How the answers are sampled.
        dump_rollouts: Whether ``dump_rollout`` writes.
    """

    def __init__(
        self,
        run: Run,
        data: PpoData,
        maker: ExperienceMaker,
        turns: GeneratorTurns,
        check: FunctionReward | None,
        *,
        sampling: SamplingConfig,
        dump_rollouts: bool,
    ) -> None:
        self.run_info = run
        self.data = data
        self.maker = maker
        self.turns = turns
        self.check = check
        self.sampling = sampling
        self.dump_rollouts = dump_rollouts

    def run(self, version: str) -> Evaluation | None:
        """Sample and score; None without held-out prompts, or when recorded rollouts are replayed. Collective."""
        prompts = self.data.eval_prompts
        if prompts is None or self.turns.generator.capabilities.is_recorded:
            return None
        sampling = self.sampling
        greedy_rollout = None
        request = GenerationRequest(prompts, sampling, n=1, seed=EVAL_SEED)
        trace, owner = self.turns.device.trace, self.turns.generator_rank
        with self.turns.generating() as generator:
            rollout = collect_rollout(
                generator, request, self.turns.world, generator_rank=owner, version=version, trace=trace
            )
            if self.check is not None:
                greedy = dataclasses.replace(sampling, temperature=0.0, top_p=1.0, top_k=-1)
                asked = dataclasses.replace(request, sampling=greedy)
                greedy_rollout = collect_rollout(
                    generator, asked, self.turns.world, generator_rank=owner, version=version, trace=trace
                )
        # Their workers score while the models do.
        checks = []
        if self.check is not None:
            checks = [self.check.start(answers) for answers in (rollout, greedy_rollout) if answers is not None]
        scored = self.maker.scorers.score(rollout, "eval")
        scores = scored.outcome
        actor, reference = self.maker.engines[ACTOR], self.maker.engines[REFERENCE]
        with actor.on_device(phase="eval"):
            log_probs = policy_log_probs(actor, rollout, sampling.temperature)
        with reference.on_device(phase="eval"):
            ref_log_probs = policy_log_probs(reference, rollout, sampling.temperature)
        accuracy, greedy_accuracy = [float(scores.result().mean()) for scores in checks] or (None, None)
        answers = response_texts(rollout, self.data.encoder.decode)
        return Evaluation(
            accuracy=accuracy,
            greedy_accuracy=greedy_accuracy,
            reward=float(scores[~scores.isnan()].mean()),
            reward_parts={name: float(part[~part.isnan()].mean()) for name, part in scored.parts.items()},
            kl=float(sequence_kl(log_probs, ref_log_probs, rollout.response_mask).mean()),
            response_length=float(rollout.response_lengths.float().mean()),
            num_prompts=len(prompts),
            samples=[
                {
                    "prompt": rollout.prompt_texts[row],
                    "response": answers[row],
                    "label": rollout.labels[row],
                    "score": None if scores[row].isnan() else float(scores[row]),
                }
                for row in range(min(NUM_SAMPLES, rollout.batch_size))
            ],
        )

    def run_and_save(self, name: str, version: str) -> None:
        """Evaluate, log the numbers, and write ``<run.dir>/eval_<name>.json``. Collective.

        Args:
            name: Name of the file, and of the moment in the log: "before" or "after".
            version: Label of the weights.
        """
        evaluation = self.run(version)
        if evaluation is None:
            return
        shown = ", ".join(f"{key} {value:.4g}" for key, value in self.metrics(evaluation).items())
        log.info(f"{name} PPO, {evaluation.num_prompts} held-out prompts: {shown}")
        if self.run_info.is_writer:
            path = self.run_info.dir / f"eval_{name}.json"
            with writing(path, "evaluation"):
                write_whole(path, json_text(dataclasses.asdict(evaluation), indent=1))

    @staticmethod
    def metrics(evaluation: Evaluation | None) -> dict[str, float]:
        """Return the numbers of an evaluation as metrics; none without an evaluation."""
        if evaluation is None:
            return {}
        values = {
            "eval/accuracy": evaluation.accuracy,
            "eval/greedy_accuracy": evaluation.greedy_accuracy,
            "eval/reward": evaluation.reward,
            "eval/kl": evaluation.kl,
            "eval/response_length": evaluation.response_length,
            **{f"eval/reward/{name}": mean for name, mean in evaluation.reward_parts.items()},
        }
        return {name: value for name, value in values.items() if value is not None}

    def dump_rollout(self, step: int, experience: Experience) -> None:
        """Write the step's prompts, responses and scores to ``<run.dir>/rollouts/``."""
        if not (self.dump_rollouts and self.run_info.is_writer):
            return
        rollout = experience.rollout
        extra: dict[str, list[Any]] = {
            "score": score_column(experience.scores.outcome),
            **{f"score_{name}": score_column(part) for name, part in experience.scores.parts.items()},
            "prompt": rollout.prompt_texts,
            "response": response_texts(rollout, self.data.encoder.decode),
        }
        write_rollouts(self.run_info.dir / "rollouts", step, rollout, extra)


def score_column(scores: Tensor) -> list[float | None]:
    """Return [B] scores for a JSON file, with None where a response has no score."""
    return [None if math.isnan(score) else score for score in scores.tolist()]

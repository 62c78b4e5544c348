"""The scorers of responses: a reward model or an ensemble of them, a Python function, or both."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from hetero_ppo.algorithms.rewards import ensemble_score, mix_scores
from hetero_ppo.config.schema import RewardConfig, RewardSource
from hetero_ppo.engines.microbatches import sequence_ends
from hetero_ppo.engines.model_engine import ModelEngine
from hetero_ppo.engines.outputs import scores_output
from hetero_ppo.reward.function import FunctionReward, PendingScores
from hetero_ppo.reward.re_encoding import ReEncoder
from hetero_ppo.step.phases import score_phases
from hetero_ppo.types import Rollout, Scores

#: Name of the reward function's stage. The stages of the models have the names of their phases (``step.phases.score_phases``).
FUNCTION_SCORES = "function_scores"


@dataclass(frozen=True)
class Stage:
    """One forward of the experience."""

    name: str
    role: ModelEngine | None  # model that computes, in a turn of its own; None: no model
    compute: Callable[[Rollout], Tensor]  # B rows -> [B, T] or [B] float32; runs in the model's turn
    per_token: bool = True  # whether the results are [B, T]
    #: Starts the stage in other processes, in parallel with the other stages; None: it runs in this one.
    begin: Callable[[Rollout], PendingScores] | None = None


@dataclass(frozen=True)
class Scorers:
    """The reward models of a run and its reward function. They give one record of scores."""

    models: Sequence[ModelEngine]  # models with score heads; empty: the function alone scores
    function: FunctionReward | None
    config: RewardConfig
    #: Role -> re-encoder of texts, for models with a tokenizer of their own.
    re_encoders: Mapping[str, ReEncoder] = field(default_factory=dict)

    def function_stages(self) -> list[Stage]:
        """Return the stage of the reward function; no stage where there is no function."""
        if self.function is None:
            return []
        return [Stage(FUNCTION_SCORES, None, self.function.score, per_token=False, begin=self.function.start)]

    def model_stage(self, phase: str, engine: ModelEngine) -> Stage:
        """Return the stage in which a reward model scores.

        Args:
            phase: Name of its phase.
            engine: Model with a score head.
        """
        compute = partial(model_scores, engine, self.re_encoders.get(engine.role))
        return Stage(phase, engine, compute, per_token=False)

    @property
    def _phases(self) -> list[str]:
        return list(score_phases([engine.role for engine in self.models]))

    def combine(self, computed: Mapping[str, Tensor]) -> Scores:
        """Return the scores that follow from the results of the stages.

        Args:
            computed: Scores of every stage by its name, [B] float32.
        """
        if not self.models:
            return Scores(computed[FUNCTION_SCORES])
        config, parts = self.config, {}
        model = computed[self._phases[0]]
        if len(self.models) > 1:
            members = torch.stack([computed[phase] for phase in self._phases])
            parts = {part_name(engine.role): scores for engine, scores in zip(self.models, members, strict=True)}
            parts["ensemble_std"] = members.std(dim=0, correction=0)
            model = ensemble_score(members, config.ensemble, config.ensemble_k)
        if config.source is not RewardSource.mix:
            return Scores(model, parts=parts)
        function = computed[FUNCTION_SCORES]
        outcome = mix_scores([(config.model_weight, model), (config.function_weight, function)])
        return Scores(outcome, parts={"model": model, "function": function, **parts})

    def score(self, rollout: Rollout, phase: str) -> Scores:
        """Score a whole rollout, every model in a turn of its own. Collective over the world."""
        models = [self.model_stage(name, engine) for name, engine in zip(self._phases, self.models, strict=True)]
        computed, stages = {}, [*self.function_stages(), *models]
        pending = {stage.name: stage.begin(rollout) for stage in stages if stage.begin is not None}
        for stage in stages:
            if stage.name not in pending:
                turn = contextlib.nullcontext() if stage.role is None else stage.role.on_device(phase=phase)
                with turn:
                    computed[stage.name] = stage.compute(rollout)
        computed |= {name: scores.result() for name, scores in pending.items()}
        self.metrics()  # drops these counts: the next step's metrics are about its own responses
        return self.combine(computed)

    def metrics(self) -> dict[str, float]:
        """Return what was counted since the last call: failures of the function, and responses that were encoded again."""
        failures = {} if self.function is None else self.function.collect()
        return failures | {
            f"reward/re_encoded/{part_name(role)}/{metric}": value
            for role, re_encoder in self.re_encoders.items()
            for metric, value in re_encoder.collect().items()
        }


def part_name(role: str) -> str:
    """Return how metrics name a reward model: ``model`` for reward_model, ``model_0`` for reward_models.0."""
    return "_".join(["model", *role.split(".")[1:]])


def model_scores(engine: ModelEngine, re_encoder: ReEncoder | None, rollout: Rollout) -> Tensor:
    """Return [B] float32 scores by a reward model, at the end of each sequence."""
    if re_encoder is None:
        token_ids, lengths = rollout.token_ids, rollout.sequence_lengths
    else:
        token_ids, lengths = re_encoder.encode(rollout)
    return engine.forward(token_ids, lengths, scores_output, sequence_ends(lengths, token_ids.shape[1]))


def part_metrics(parts: Mapping[str, Tensor]) -> dict[str, float]:
    """Return mean and population standard deviation of every part, without the rows that have no score."""
    metrics: dict[str, float] = {}
    for name, scores in parts.items():
        scores = scores[~scores.isnan()]
        metrics |= {f"reward/{name}/mean": float(scores.mean()), f"reward/{name}/std": float(scores.std(correction=0))}
    return metrics

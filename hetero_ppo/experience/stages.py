"""The stages of an experience, one for each forward of the step, and the maths between their results and the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from hetero_ppo.algorithms.advantage_registry import build_estimator
from hetero_ppo.algorithms.advantages import AdvantageEstimator, AdvantageInputs
from hetero_ppo.algorithms.kl import AdaptiveKlController, FixedKlController, build_kl_controller, kl_estimate
from hetero_ppo.algorithms.masking import whiten
from hetero_ppo.algorithms.rewards import (
    RunningMoments,
    apply_truncation,
    clip_scores,
    normalise_scores,
    token_level_rewards,
)
from hetero_ppo.algorithms.rollout_correction import mismatch_metrics, truncated_weights
from hetero_ppo.config.schema import AlgorithmConfig, OldLogProbs, PpoConfig, RewardConfig, RolloutCorrectionKind
from hetero_ppo.distributed.statistics import global_masked_moments
from hetero_ppo.engines.model_engine import ModelEngine
from hetero_ppo.engines.outputs import log_probs_output, values_output
from hetero_ppo.errors import RunError
from hetero_ppo.experience.scorers import FUNCTION_SCORES, Scorers, Stage, part_metrics
from hetero_ppo.reward.function import FunctionReward
from hetero_ppo.reward.re_encoding import ReEncoder
from hetero_ppo.step.phases import Phase, step_phases
from hetero_ppo.types import Experience, Rollout, Scores


def policy_log_probs(engine: ModelEngine, rollout: Rollout, temperature: float) -> Tensor:
    """Return [B, T] float32 log-probs of the rollout's tokens under a policy, at the sampling temperature."""
    output = log_probs_output(
        temperature=temperature, vocab_size=engine.vocab_size, groups=engine.groups, num_parts=engine.vocab_parts
    )
    log_probs = engine.forward(rollout.token_ids, rollout.sequence_lengths, output, pad(rollout.response_mask, (0, 1)))
    return log_probs.masked_fill(~rollout.response_mask, 0)


def state_values(engine: ModelEngine, rollout: Rollout) -> Tensor:
    """Return [B, T] float32 values of the states before each response token."""
    output_mask = pad(rollout.response_mask, (0, 1))
    values = engine.forward(rollout.token_ids, rollout.sequence_lengths, values_output, output_mask)
    return values.masked_fill(~rollout.response_mask, 0)


@dataclass
class ExperienceMaker:
    """Names the stages of an experience, and assembles their results. The engines have the weights that sampled the rollout."""

    engines: Mapping[str, ModelEngine]  # role -> engine
    phases: Sequence[Phase]  # of a step, in order (``step.phases``)
    scorers: Scorers
    estimator: AdvantageEstimator
    algorithm: AlgorithmConfig
    reward_config: RewardConfig
    temperature: float
    kl_controller: FixedKlController | AdaptiveKlController
    score_moments: RunningMoments

    def stages(self) -> list[Stage]:
        """Return the stages of an experience: one for each forward phase of the step, in the step's order.

        The reward function's stage comes first. It needs no role, so the first role's parameters are copied to the device meanwhile.
        """
        forwards = [
            self._stage(phase.name, self.engines[phase.role])
            for phase in self.phases
            if phase.role is not None and phase.is_forward
        ]
        return [*self.scorers.function_stages(), *forwards]

    def _stage(self, phase: str, engine: ModelEngine) -> Stage:
        """Return the stage of a forward phase. The head of the phase's role decides what it computes."""
        if engine.head == "score":
            return self.scorers.model_stage(phase, engine)
        if engine.head == "value":
            return Stage(phase, engine, partial(state_values, engine))
        return Stage(phase, engine, partial(policy_log_probs, engine, temperature=self.temperature))

    def assemble(self, rollout: Rollout, computed: Mapping[str, Tensor]) -> Experience:
        """Compute rewards and advantages, and whiten these. Every rank holds all rows, so no collective is needed.

        Args:
            rollout: B responses.
            computed: Name of a stage -> its results of all rows, [B, T] or [B] float32.

        Raises:
            FloatingPointError: A forward gave a NaN or an infinity.
            RunError: The reward function has failed for every response, or no token is left to learn from.
        """
        for name, tensor in computed.items():
            # A reward function leaves NaN where it failed, and reward.on_error=exclude.
            may_lack = name == FUNCTION_SCORES
            if not bool((torch.isfinite(tensor) | (may_lack & tensor.isnan())).all()):
                raise FloatingPointError(
                    f"make experience: {name} has values that are not finite; see the rollout dump"
                )
        algorithm = self.algorithm
        scores = self.scorers.combine(computed)
        values, ref_log_probs = computed.get("values"), computed["ref_log_probs"]
        old_log_probs = computed.get("old_log_probs", rollout.rollout_log_probs)  # without the stage: the generator's
        if bool(scores.outcome.isnan().all()):
            assert self.scorers.function is not None
            last = self.scorers.function.last_failure
            raise RunError(
                f"reward.function {self.reward_config.function} has failed for every response of the step; the last time: {last}"
            )
        shaped, mask = self._shape_outcome(rollout, scores.outcome)
        if not bool(mask.any()):
            raise RunError(
                "make experience: no response of the step has a token to learn from: with algorithm.truncated=mask each one was "
                "truncated or left out. Raise rollout.sampling.max_tokens, or choose algorithm.truncated=penalise or score"
            )
        kl = kl_estimate(old_log_probs, ref_log_probs, algorithm.kl.estimator, algorithm.kl.clamp)
        kl = kl.masked_fill(~rollout.response_mask, 0)
        rewards = token_level_rewards(shaped, scores.process, kl, mask, self.kl_controller.coef)
        estimated = self.estimator.estimate(AdvantageInputs(rewards, mask, torch.tensor(rollout.prompt_index), values))
        advantages = estimated.advantages
        if algorithm.whiten_advantages:
            moments = global_masked_moments(advantages, mask, None)
            advantages = whiten(advantages, mask, moments.mean, moments.var)
        tis_weights, comparison = compare_with_generator(algorithm, rollout, old_log_probs, mask)
        metrics = experience_metrics(rollout, scores, rewards, old_log_probs, ref_log_probs, self.kl_controller.coef)
        return Experience(
            rollout=rollout,
            response_mask=mask,
            old_log_probs=old_log_probs,
            ref_log_probs=ref_log_probs,
            values=None if values is None else values.masked_fill(~mask, 0),
            scores=scores,
            token_level_rewards=rewards,
            advantages=advantages,
            returns=estimated.returns,
            tis_weights=tis_weights,
            metrics=metrics | comparison | self.scorers.metrics(),
        )

    def _shape_outcome(self, rollout: Rollout, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outcome scores as the policy sees them, and the mask of the tokens that it learns from.

        A response without a score has no such token.
        """
        has_score = ~scores.isnan()
        shaped = scores.masked_fill(~has_score, 0)
        if self.reward_config.normalise:
            self.score_moments.update(scores[has_score])
            shaped = normalise_scores(shaped, self.score_moments.mean, self.score_moments.var)
        shaped = clip_scores(shaped, self.reward_config.clip)
        algorithm = self.algorithm
        return apply_truncation(
            shaped,
            rollout.response_mask & has_score[:, None],
            rollout.truncated,
            algorithm.truncated,
            algorithm.truncation_score,
        )


def build_maker(
    config: PpoConfig,
    engines: Mapping[str, ModelEngine],
    function: FunctionReward | None,
    re_encoders: Mapping[str, ReEncoder],
) -> ExperienceMaker:
    """Build the maker of experiences of a run.

    Args:
        config: Configuration of the run.
        engines: Engines of the run's roles, by name.
        function: The ``reward.function``; None: reward models alone score.
        re_encoders: Re-encoders of the reward models that have a tokenizer of their own, by role.
    """
    reward_models = [engine for engine in engines.values() if engine.head == "score"]
    return ExperienceMaker(
        engines=engines,
        phases=step_phases(config),
        scorers=Scorers(reward_models, function, config.reward, re_encoders),
        estimator=build_estimator(config.algorithm),
        algorithm=config.algorithm,
        reward_config=config.reward,
        temperature=config.rollout.sampling.temperature,
        kl_controller=build_kl_controller(config.algorithm.kl),
        score_moments=RunningMoments(),
    )


def compare_with_generator(
    algorithm: AlgorithmConfig, rollout: Rollout, old_log_probs: Tensor, mask: Tensor
) -> tuple[Tensor | None, dict[str, float]]:
    """Compare the trainer's log-probs with the generator's, and return weights that correct for the difference.

    Args:
        algorithm: Section of the configuration.
        rollout: B responses with the generator's log-probs.
        old_log_probs: [B, T] float32, log-probs by the trainer.
        mask: [B, T] bool, tokens of the losses.

    Returns:
        [B, T] float32 importance weights, None where no correction is asked for; and the metrics. Where the old log-probs are the
        generator's own there is nothing to compare: no weights and no metrics.
    """
    if algorithm.old_log_probs is OldLogProbs.rollout:
        return None, {}
    generated = rollout.rollout_log_probs
    metrics = mismatch_metrics(old_log_probs, generated, rollout.response_mask)
    correction = algorithm.rollout_correction
    if correction.kind is RolloutCorrectionKind.none:
        return None, metrics
    weights, weight_metrics = truncated_weights(old_log_probs, generated, mask, correction.level, correction.cap)
    return weights, metrics | weight_metrics


def sequence_kl(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Return [B] nats: the log-ratio to the reference summed over each response, an unbiased estimate of the sequence KL."""
    return (log_probs - ref_log_probs).masked_fill(~mask, 0).sum(dim=1)


def experience_metrics(
    rollout: Rollout,
    scores: Scores,
    rewards: Tensor,
    old_log_probs: Tensor,
    ref_log_probs: Tensor,
    kl_coef: float,
) -> dict[str, float]:
    """Return the metrics of the whole rollout batch, with verl's names."""
    mask = rollout.response_mask
    lengths = rollout.response_lengths.float()
    kl = sequence_kl(old_log_probs, ref_log_probs, mask)
    has_score = ~scores.outcome.isnan()
    outcome = scores.outcome[has_score]
    return {
        "reward/mean": float(outcome.mean()),
        "reward/std": float(outcome.std(correction=0)),
        "reward/min": float(outcome.min()),
        "reward/max": float(outcome.max()),
        "reward/num_excluded": float((~has_score).sum()),
        **part_metrics(scores.parts),
        "reward/with_kl_mean": float(rewards[has_score].sum(dim=1).mean()),
        "kl/reference": float(kl.mean()),
        "kl/coef": kl_coef,
        "response_length/mean": float(lengths.mean()),
        "response_length/max": float(lengths.max()),
        "response_length/clip_ratio": float(rollout.truncated.float().mean()),
    }

"""Rule of the distribution that log-probs belong to."""

from __future__ import annotations

from hetero_ppo.config.require import require
from hetero_ppo.config.schema import AlgorithmConfig, OldLogProbs, RolloutCorrectionKind, SamplingConfig


def check_same_distribution(sampling: SamplingConfig, algorithm: AlgorithmConfig) -> None:
    """Raise where a ratio would divide probabilities of two different distributions.

    With top-p or top-k the generator's log-probs are relative to the tokens that it kept, and the trainer's to the whole vocabulary.
    Their ratio is then the probability of the kept tokens, even if both policies are equal.
    """
    cuts = {"top_p": (sampling.top_p, 1.0), "top_k": (sampling.top_k, -1)}
    for option, (value, whole) in cuts.items():
        reason = (
            "the generator's log-probs are then relative to the tokens that it keeps, and the trainer's to the whole vocabulary, so "
            f"their ratio is no importance weight; set rollout.sampling.{option}={whole:g}, or"
        )
        require(
            value == whole or algorithm.rollout_correction.kind is RolloutCorrectionKind.none,
            f"rollout.sampling.{option}",
            value,
            f"{reason} algorithm.rollout_correction.kind=none",
        )
        require(
            value == whole or algorithm.old_log_probs is OldLogProbs.actor,
            f"rollout.sampling.{option}",
            value,
            f"{reason} algorithm.old_log_probs=actor",
        )

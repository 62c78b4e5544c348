"""Rule about the distribution that log-probs are of, run by ``checks.check_config``."""

from __future__ import annotations

from hetero_ppo.config.require import require
from hetero_ppo.config.schema import OldLogProbs, PpoConfig, RolloutCorrectionKind


def check_same_distribution(config: PpoConfig, world_size: int) -> None:
    """Raise where log-probs of two distributions would be divided by each other.

    With top-p or top-k the engine's log-probs are of the tokens that were kept, the trainer's of the whole vocabulary: their
    ratio is the kept tokens' share of the probability, also where both policies are one.
    """
    sampling, algorithm = config.rollout.sampling, config.algorithm
    cuts = {"top_p": (sampling.top_p, 1.0), "top_k": (sampling.top_k, -1)}
    for option, (value, whole) in cuts.items():
        reason = (
            "the engine's log-probs are then of the tokens that it keeps, the trainer's of the whole vocabulary, and their ratio is "
            f"no importance weight; set rollout.sampling.{option}={whole:g}, or"
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

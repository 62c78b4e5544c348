"""Sections of the objective: KL penalty, corrections, losses and the batches that they are computed over."""

from __future__ import annotations

from dataclasses import dataclass

from hetero_ppo.config.schema.choices import (
    CorrectionLevel,
    KlController,
    KlEstimator,
    OldLogProbs,
    RolloutCorrectionKind,
    TruncatedResponses,
)
from hetero_ppo.config.schema.option import PLAIN, OnResume, option, section


@dataclass
class KlConfig:
    """KL between policy and reference: a penalty in the reward, and a term of the actor's loss."""

    estimator: KlEstimator = option(
        KlEstimator.k1, "Estimator of the penalty (Schulman 2020)", resume=OnResume.objective
    )
    controller: KlController = option(KlController.fixed, "Control of the penalty's weight", resume=OnResume.objective)
    coef: float = option(
        0.05,
        "Weight of the penalty in the reward: fixed, or the initial one",
        unit=PLAIN,
        minimum=0,
        resume=OnResume.applied,
    )
    target: float = option(
        6.0, "KL that the adaptive controller aims at", unit="nats per sequence", above=0, resume=OnResume.applied
    )
    horizon: int = option(
        10_000,
        "Horizon of the adaptive controller (Ziegler et al. 2019, section 2.2)",
        unit="samples",
        minimum=1,
        resume=OnResume.applied,
    )
    loss_coef: float = option(
        0.0, "Weight of the KL in the actor's loss", unit=PLAIN, minimum=0, resume=OnResume.objective
    )
    loss_estimator: KlEstimator = option(KlEstimator.k3, "Estimator of the KL in the loss", resume=OnResume.objective)
    clamp: float | None = option(
        10.0,
        "Bound c: a token's estimate, in penalty and loss, is clamped to [-c, c]; null: no bound",
        unit="nats",
        above=0,
        resume=OnResume.objective,
    )


@dataclass
class RolloutCorrectionConfig:
    """Importance weights on the policy loss, for the difference between generator and trainer."""

    kind: RolloutCorrectionKind = option(
        RolloutCorrectionKind.none, "Correction of the policy loss", resume=OnResume.objective
    )
    # A smaller cap would scale down tokens on which generator and trainer agree.
    cap: float = option(2.0, "Largest weight", unit=PLAIN, minimum=1, finite=True, resume=OnResume.objective)
    level: CorrectionLevel = option(
        CorrectionLevel.token, "Part of a response that one weight covers", resume=OnResume.objective
    )


@dataclass
class AlgorithmConfig:
    """PPO's objective and batches."""

    advantage: str = option(
        "gae",
        "Estimator of advantages: gae (Schulman et al. 2016), which needs a critic",
        resume=OnResume.objective,
    )
    gamma: float = option(1.0, "Discount of later rewards", unit=PLAIN, minimum=0, maximum=1, resume=OnResume.objective)
    lam: float = option(
        0.95,
        "Decay of later temporal-difference errors in GAE (lambda)",
        unit=PLAIN,
        minimum=0,
        maximum=1,
        resume=OnResume.objective,
    )
    clip_ratio: float = option(
        0.2,
        "Distance from 1 beyond which the probability ratio is clipped",
        unit=PLAIN,
        above=0,
        resume=OnResume.objective,
    )
    dual_clip: float | None = option(
        None,
        "Constant c of dual-clip PPO (Ye et al. 2020), 3.0 in the paper; null: off",
        unit=PLAIN,
        above=1,
        resume=OnResume.objective,
    )
    value_clip: float | None = option(
        None,
        "Largest |value - old value| that the value loss follows; null: off",
        unit="units of the reward",
        above=0,
        resume=OnResume.objective,
    )
    entropy_coef: float = option(0.0, "Weight of the entropy bonus", unit=PLAIN, minimum=0, resume=OnResume.objective)
    old_log_probs: OldLogProbs = option(
        OldLogProbs.actor, "Source of the log-probs of the policy that sampled", resume=OnResume.objective
    )
    rollout_correction: RolloutCorrectionConfig = section(
        RolloutCorrectionConfig, "Importance weights for the difference between generator and trainer"
    )
    whiten_advantages: bool = option(
        True, "Advantages are whitened over the whole rollout batch and all ranks", resume=OnResume.objective
    )
    ppo_epochs: int = option(1, "Passes over the rollout batch", unit="passes", minimum=1, resume=OnResume.applied)
    rollout_batch_size: int = option(
        64, "Size of a PPO step over all ranks", unit="prompts", minimum=1, resume=OnResume.applied
    )
    samples_per_prompt: int = option(
        1, "Number of responses to each prompt", unit="responses", minimum=1, resume=OnResume.applied
    )
    minibatch_size: int = option(
        16, "Size of an optimizer step over all ranks", unit="responses", minimum=1, resume=OnResume.applied
    )
    critic_epochs: int | None = option(
        None,
        "Passes of the critic over the rollout batch; null: ppo_epochs",
        unit="passes",
        minimum=1,
        resume=OnResume.applied,
    )
    critic_minibatch_size: int | None = option(
        None,
        "Size of an optimizer step of the critic over all ranks; null: minibatch_size",
        unit="responses",
        minimum=1,
        resume=OnResume.applied,
    )
    critic_warmup_steps: int = option(
        0, "Steps at the start that train the critic only", unit="PPO steps", minimum=0, resume=OnResume.applied
    )
    truncated: TruncatedResponses = option(
        TruncatedResponses.score, "Treatment of a response that reached the length limit", resume=OnResume.objective
    )
    truncation_score: float = option(
        -1.0,
        "Score of a truncated response with truncated: penalise",
        unit="units of the score",
        resume=OnResume.objective,
    )
    kl: KlConfig = section(KlConfig, "KL between policy and reference")

"""Rules of a PPO run: batches, objective, and the options that need each other."""

from __future__ import annotations

from hetero_ppo.config.checks_numerics import check_same_distribution
from hetero_ppo.config.checks_reward_function import check_function_calls, check_function_names
from hetero_ppo.config.checks_rewards import check_ensemble, check_reward_source
from hetero_ppo.config.checks_rollout import (
    check_actor_as_generator,
    check_over_sampling,
    check_sampling,
    check_weight_transfer,
)
from hetero_ppo.config.derived import (
    RESPONSES_FIELDS,
    actor_generates,
    config_reward_models,
    config_roles,
    data_parallel_size,
    exact_quotient,
    passes,
    trained_roles,
)
from hetero_ppo.config.require import require
from hetero_ppo.config.schema import (
    AlgorithmConfig,
    KlConfig,
    KlController,
    MismatchConfig,
    OldLogProbs,
    PpoConfig,
    PpoTrainConfig,
    RolloutCorrectionKind,
)


def check_ppo(config: PpoConfig, world_size: int) -> None:
    """Raise for the first rule that a PPO run breaks and other kinds of runs do not have."""
    check_rollout_batch(config, world_size)
    check_mismatch(config.rollout.mismatch, config.algorithm)
    check_critic_warmup(config.algorithm, config.train)
    if config.critic is None:
        check_absent_critic(config.algorithm)
    check_adaptive_kl(config.algorithm.kl)
    check_same_distribution(config.rollout.sampling, config.algorithm)
    check_reward_source(config.reward, has_model=bool(config_reward_models(config)))
    check_ensemble(config)
    check_function_names(config.reward, config.train, has_eval=config.data.eval is not None)
    check_function_calls(config.reward, config.train)
    check_sampling(config.rollout)
    check_weight_transfer(config, world_size)
    check_over_sampling(config)
    require(
        config.pipeline.chunk_size != 0 or config.train.replay_rollouts is None,
        "pipeline.chunk_size",
        config.pipeline.chunk_size,
        "a sweep needs a generator to measure, not train.replay_rollouts",
    )
    if actor_generates(config):
        check_actor_as_generator(config)


def check_rollout_batch(config: PpoConfig, world_size: int) -> None:
    """Raise where responses do not divide over the data-parallel ranks of every role, or minibatches over those of a trained one."""
    algorithm = config.algorithm
    responses = algorithm.rollout_batch_size * algorithm.samples_per_prompt
    for name, role in config_roles(config).items():
        ranks = data_parallel_size(name, role.parallel, world_size)
        exact_quotient(responses, ranks, RESPONSES_FIELDS, f"the data-parallel size of {name}")
        if name in trained_roles(config):
            own = passes(algorithm, name)
            exact_quotient(responses, own.minibatch_size, RESPONSES_FIELDS, own.size_field)
            exact_quotient(own.minibatch_size, ranks, own.size_field, f"the data-parallel size of {name}")


def check_mismatch(mismatch: MismatchConfig, algorithm: AlgorithmConfig) -> None:
    """Raise for a bound on the mismatch, or its correction, where the trainer computes no log-probs to compare with."""
    correction = algorithm.rollout_correction
    compared = algorithm.old_log_probs is OldLogProbs.actor
    uncompared = "with algorithm.old_log_probs=rollout there is nothing to compare; set that to actor, or this to"
    for field in ("max_log_prob_diff_mean", "max_ratio_outside_share"):
        bound = vars(mismatch)[field]
        require(bound is None or compared, f"rollout.mismatch.{field}", bound, f"{uncompared} null")
    corrects = correction.kind is not RolloutCorrectionKind.none
    require(compared or not corrects, "algorithm.rollout_correction.kind", correction.kind.value, f"{uncompared} none")


def check_critic_warmup(algorithm: AlgorithmConfig, train: PpoTrainConfig) -> None:
    """Raise where the critic's warm-up takes all steps of the run."""
    require(
        train.steps is None or algorithm.critic_warmup_steps < train.steps,
        "algorithm.critic_warmup_steps",
        algorithm.critic_warmup_steps,
        f"train.steps={train.steps}, so the actor would never be trained; warm up for fewer steps",
    )


def check_absent_critic(algorithm: AlgorithmConfig) -> None:
    """Raise for options of a critic in a run without one."""
    for field, unset in (
        ("critic_epochs", None),
        ("critic_minibatch_size", None),
        ("critic_warmup_steps", 0),
        ("value_clip", None),
    ):
        value = vars(algorithm)[field]
        require(
            value == unset,
            f"algorithm.{field}",
            value,
            "critic is null, so the run trains no values; leave it out, or give a critic",
        )


def check_adaptive_kl(kl: KlConfig) -> None:
    """Raise for an adaptive controller that would multiply a coefficient of 0."""
    require(
        kl.controller is not KlController.adaptive or kl.coef > 0,
        "algorithm.kl.coef",
        kl.coef,
        "the adaptive controller multiplies it, so it has to start above 0",
    )

"""Options that a run does not use because of another option: they are printed when somebody has set them.

An option that a kind of run never uses is not in its schema. Where an option that would be ignored is more likely a mistake than a
left-over, ``checks`` refuses it instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from omegaconf import OmegaConf

from hetero_ppo.config.derived import actor_generates, config_reward_models, config_roles, trained_roles
from hetero_ppo.config.field_types import hints_of, item_class, section_class
from hetero_ppo.config.load import AnyConfig, LoadedConfig
from hetero_ppo.config.schema import (
    KlController,
    LrSchedule,
    OldLogProbs,
    PpoConfig,
    RmConfig,
    RolloutCorrectionKind,
    SftConfig,
    TruncatedResponses,
)

#: Options of the servers that answer prompts.
_SERVERS = (
    "interface",
    "num_servers",
    "kv_cache_mib",
    "gpu_memory_utilization",
    "server_threads",
    "tensor_parallel",
    "sleep",
    "start_timeout_s",
    "request_timeout_s",
    "sync_timeout_s",
    "weight_transfer",
    "max_restarts",
    "bank",
)
_SERVERS_MEMORY = ("memory.engine_graphs_mib", "memory.engine_runtime_mib")
_GENERATORS = (*_SERVERS, "max_num_seqs", "verify_sync", "verify_sync_tolerance")


C_contra = TypeVar("C_contra", bound=AnyConfig, contravariant=True)


@dataclass(frozen=True)
class UnusedOptions(Generic[C_contra]):
    """Options that runs of a kind do not read under a condition."""

    fields: tuple[str, ...]  # dotted
    applies: Callable[[C_contra], bool]
    reason: str


def _fields(section: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names)


def _always(config: AnyConfig) -> bool:
    return True


SUPERVISED_OPTIONS: tuple[UnusedOptions[SftConfig | RmConfig], ...] = (
    UnusedOptions(("train.eval_batches",), lambda config: config.data.eval is None, "there is no data.eval"),
)
PPO_OPTIONS: tuple[UnusedOptions[PpoConfig], ...] = (
    UnusedOptions(
        ("reward.golden_every",), lambda config: not config_reward_models(config), "there is no reward model"
    ),
    UnusedOptions(("algorithm.lam",), lambda config: config.critic is None, "critic is null, and lambda is of values"),
    UnusedOptions(("reward.on_error",), lambda config: config.reward.function is None, "there is no reward.function"),
    UnusedOptions(
        ("reward.timeout_s",),
        lambda config: config.reward.function is None and config.train.eval_function is None,
        "there is neither reward.function nor train.eval_function",
    ),
    UnusedOptions(
        ("algorithm.truncation_score",),
        lambda config: config.algorithm.truncated is not TruncatedResponses.penalise,
        "algorithm.truncated is not penalise",
    ),
    UnusedOptions(
        _fields("algorithm.kl", "target", "horizon"),
        lambda config: config.algorithm.kl.controller is not KlController.adaptive,
        "algorithm.kl.controller is fixed",
    ),
    UnusedOptions(
        ("algorithm.kl.loss_estimator",),
        lambda config: config.algorithm.kl.loss_coef == 0,
        "algorithm.kl.loss_coef is 0",
    ),
    UnusedOptions(
        _fields("algorithm.rollout_correction", "cap", "level"),
        lambda config: config.algorithm.rollout_correction.kind is RolloutCorrectionKind.none,
        "algorithm.rollout_correction.kind is none",
    ),
    UnusedOptions(
        ("rollout.mismatch.patience",),
        lambda config: config.algorithm.old_log_probs is OldLogProbs.rollout,
        "algorithm.old_log_probs is rollout, so nothing is compared",
    ),
    UnusedOptions(_fields("rollout", *_SERVERS), lambda config: actor_generates(config), "rollout.engine is megatron"),
    UnusedOptions(_SERVERS_MEMORY, lambda config: actor_generates(config), "rollout.engine is megatron"),
    UnusedOptions(
        _SERVERS_MEMORY,
        lambda config: config.train.replay_rollouts is not None,
        "train.replay_rollouts takes the place of a generator",
    ),
    UnusedOptions(
        _fields("rollout", "engine", *_GENERATORS),
        lambda config: config.train.replay_rollouts is not None,
        "train.replay_rollouts takes the place of a generator",
    ),
    UnusedOptions(
        ("data.eval", "train.eval_every", "train.eval_function"),
        lambda config: config.train.replay_rollouts is not None,
        "a run of recorded rollouts answers no held-out prompts",
    ),
    UnusedOptions(
        ("rollout.verify_sync_tolerance",),
        lambda config: not config.rollout.verify_sync,
        "rollout.verify_sync is false",
    ),
    UnusedOptions(
        ("pipeline.sweep_s",), lambda config: config.pipeline.chunk_size != 0, "pipeline.chunk_size is not 0"
    ),
    UnusedOptions(("pipeline.overlap",), lambda config: actor_generates(config), "rollout.engine is megatron"),
    UnusedOptions(("residency.overlap",), lambda config: not config.residency.offload, "residency.offload is false"),
)
COMMON_OPTIONS: tuple[UnusedOptions[AnyConfig], ...] = (
    UnusedOptions(
        ("train.epochs",), lambda config: config.train.steps is not None, "train.steps says how long the run is"
    ),
)
BY_KIND: dict[type, tuple[UnusedOptions[Any], ...]] = {
    SftConfig: SUPERVISED_OPTIONS,
    RmConfig: SUPERVISED_OPTIONS,
    PpoConfig: PPO_OPTIONS,
}


def unused_options(loaded: LoadedConfig) -> list[str]:
    """Return a line for every option that the run does not use: removed ones, and those with another value than their default."""
    config = loaded.config
    lines = list(loaded.removed)
    for options in (*COMMON_OPTIONS, *BY_KIND[type(config)], *_role_options(config)):
        if not options.applies(config):
            continue
        for field in options.fields:
            value = OmegaConf.select(loaded.node, field)
            if field in loaded.origins and value != _default(type(config), field):
                lines.append(f"{field}={getattr(value, 'value', value)} is not used: {options.reason}")
    return list(dict.fromkeys(lines))


def _default(section: type, field: str) -> Any:
    """Return the default of an option. The saved configuration of a run sets defaults too, so these are not reported."""
    *sections, name = field.split(".")
    for part in sections:
        if not part.isdecimal():
            hint = hints_of(section)[part]
            nested = item_class(hint) or section_class(hint)
            assert nested is not None  # the field was found in it
            section = nested
    return {option.name: option.default for option in dataclasses.fields(section)}[name]


def _role_options(config: AnyConfig) -> Iterator[UnusedOptions[AnyConfig]]:
    """Yield the options that a role does not use because of another option of that role."""
    for name, role in config_roles(config).items():
        if role.micro_batch_tokens is not None:
            yield UnusedOptions(
                _fields(name, "micro_batch_size"), _always, f"{name}.micro_batch_tokens cuts micro-batches by tokens"
            )
    for name, role in trained_roles(config).items():
        if role.optimizer.lr_schedule is LrSchedule.constant:
            yield UnusedOptions(_fields(name, "optimizer.min_lr"), _always, f"{name}.optimizer.lr_schedule is constant")

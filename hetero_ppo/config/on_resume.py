"""What becomes of an option that has another value when a run goes on from a checkpoint.

Every field of every class of ``schema/`` has one entry in ``TABLE``, in the form that a field's metadata would have: class, name, rule.
A section's own entry decides for all fields below it; ``OnResume.section`` leaves the decision to them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from enum import Enum
from functools import cache
from typing import Any, get_args, get_type_hints

from hetero_ppo.config import schema
from hetero_ppo.config.load import item_class, section_class


class OnResume(Enum):
    """Rule for an option whose value is not the checkpoint's."""

    section = "its fields decide"
    start = "belongs to one start of a run, and is not compared"
    operation = "applied; it changes how the run works, and no number but by rounding"
    applied = "applied from the next step on"
    objective = "refused unless checkpoint.allow_changes names it"
    form = "refused: the checkpoint is stored in this form"
    content = "compared by content; where it is found may change"
    weights = "frozen role: compared by digest of the weights; trained role: no effect, its weights are the checkpoint's"
    dtype = "frozen role: refused unless checkpoint.allow_changes names it; trained role: refused, the checkpoint is stored in this form"
    no_effect = "no effect: the checkpoint has what it would decide"
    newer = "newer than the checkpoint, with its default; applied"  # not in the table


S, START, OPERATION, APPLIED = OnResume.section, OnResume.start, OnResume.operation, OnResume.applied
OBJECTIVE, FORM, CONTENT = OnResume.objective, OnResume.form, OnResume.content

_ROLE: dict[str, OnResume] = {
    "model": S,
    "parallel": OPERATION,
    "micro_batch_size": OPERATION,
    "micro_batch_tokens": OPERATION,
    "packing": OPERATION,
    "aligned": OPERATION,
}
_TRAINED_ROLE: dict[str, OnResume] = {
    **_ROLE,
    "optimizer": S,
    "ddp": OPERATION,
    "recompute": OPERATION,
    "forward_micro_batch_tokens": OPERATION,
}
_RUN: dict[str, OnResume] = {"kind": FORM, "run": S, "data": S, "checkpoint": S, "memory": OPERATION}

#: Class -> field -> rule. Fields below a section with a rule of its own are not listed.
TABLE: dict[type, dict[str, OnResume]] = {
    schema.SftConfig: {**_RUN, "actor": S, "train": S},
    schema.RmConfig: {**_RUN, "reward": S, "train": S, "loss": S},
    schema.PpoConfig: {
        **_RUN,
        "actor": S,
        "critic": S,
        "reference": S,
        "reward_model": S,
        "reward_models": S,
        "reward": S,
        "algorithm": S,
        "rollout": S,
        "train": S,
        "pipeline": OPERATION,
        "residency": OPERATION,
    },
    schema.ModelConfig: {
        "path": OnResume.weights,
        "tokenizer": CONTENT,
        "dtype": OnResume.dtype,
        "head_init": OnResume.no_effect,
        "init_seed": OnResume.no_effect,
    },
    schema.RoleConfig: _ROLE,
    schema.TrainedRoleConfig: _TRAINED_ROLE,
    schema.TrainedRewardConfig: _TRAINED_ROLE,
    schema.RewardRoleConfig: {**_ROLE, "re_encode": S},
    schema.ReEncodeConfig: {"max_tokens": OBJECTIVE, "chat_template": CONTENT},
    schema.OptimizerConfig: {
        "lr": APPLIED,
        "min_lr": APPLIED,
        "lr_schedule": APPLIED,
        "warmup_steps": APPLIED,
        "weight_decay": APPLIED,
        "decay_norms_and_biases": APPLIED,
        "beta1": APPLIED,
        "beta2": APPLIED,
        "eps": APPLIED,
        "grad_clip": APPLIED,
        "max_skipped_steps": OPERATION,
        "distributed": FORM,
    },
    schema.DataConfig: {
        "train": CONTENT,
        "eval": APPLIED,
        "messages_key": CONTENT,
        "prompt_key": CONTENT,
        "completion_key": CONTENT,
        "chosen_key": CONTENT,
        "rejected_key": CONTENT,
        "label_key": CONTENT,
        "metadata_key": CONTENT,
        "tools_key": CONTENT,
        "chat_template": CONTENT,
        "apply_chat_template": CONTENT,
        "max_prompt_tokens": CONTENT,
        "max_sequence_tokens": CONTENT,
        "overlong_prompts": CONTENT,
        "shuffle": OBJECTIVE,
    },
    schema.RunConfig: {
        "dir": START,
        "overwrite": START,
        "seed": OBJECTIVE,
        "log_every": OPERATION,
        "threads": OPERATION,
        "deterministic": OPERATION,
        "tensorboard": OPERATION,
        "wandb_project": OPERATION,
        "timeout_minutes": OPERATION,
        "phase_timeout_minutes": OPERATION,
        "heartbeat_timeout_s": OPERATION,
        "stop_within_s": OPERATION,
    },
    schema.CheckpointConfig: {
        "every": OPERATION,
        "async_save": OPERATION,
        "keep": OPERATION,
        "keep_best": OPERATION,
        "load": START,
        "step": START,
        "allow_changes": START,
        "export_hf": OPERATION,
    },
    schema.SupervisedTrainConfig: {
        "steps": APPLIED,
        "epochs": APPLIED,
        "global_batch_size": APPLIED,
        "eval_every": OPERATION,
        "eval_batches": OPERATION,
    },
    schema.RewardModelLossConfig: {"margin": OBJECTIVE, "score_l2": OBJECTIVE},
    schema.SamplingConfig: {
        "temperature": OBJECTIVE,
        "top_p": OBJECTIVE,
        "top_k": OBJECTIVE,
        "max_tokens": OBJECTIVE,
        "ignore_eos": OBJECTIVE,
        "stop_token_ids": OBJECTIVE,
        "stop": OBJECTIVE,
    },
    schema.RolloutConfig: {
        "engine": OPERATION,
        "num_servers": OPERATION,
        "interface": OPERATION,
        "dtype": APPLIED,
        "max_num_seqs": OPERATION,
        "kv_cache_mib": OPERATION,
        "gpu_memory_utilization": OPERATION,
        "server_threads": OPERATION,
        "tensor_parallel": OPERATION,
        "batch_invariant": OPERATION,
        "sleep": OPERATION,
        "start_timeout_s": OPERATION,
        "request_timeout_s": OPERATION,
        "sync_timeout_s": OPERATION,
        "weight_transfer": OPERATION,
        "hang_timeout_s": OPERATION,
        "max_restarts": OPERATION,
        "bank": OPERATION,
        "verify_sync": OPERATION,
        "verify_sync_tolerance": OPERATION,
        "over_sampling": APPLIED,
        "mismatch": OPERATION,
        "sampling": S,
        "eval_sampling": APPLIED,
    },
    schema.RewardConfig: {
        "source": OBJECTIVE,
        "function": CONTENT,
        "model_weight": OBJECTIVE,
        "function_weight": OBJECTIVE,
        "ensemble": OBJECTIVE,
        "ensemble_k": OBJECTIVE,
        "timeout_s": OPERATION,
        "workers": OPERATION,
        "batch": OPERATION,
        "concurrency": OPERATION,
        "on_error": APPLIED,
        "clip": OBJECTIVE,
        "golden_every": OPERATION,
        "normalise": OBJECTIVE,
    },
    schema.KlConfig: {
        "estimator": OBJECTIVE,
        "controller": OBJECTIVE,
        "coef": APPLIED,
        "target": APPLIED,
        "horizon": APPLIED,
        "clamp": OBJECTIVE,
        "loss_coef": OBJECTIVE,
        "loss_estimator": OBJECTIVE,
    },
    schema.RolloutCorrectionConfig: {"kind": OBJECTIVE, "cap": OBJECTIVE, "level": OBJECTIVE},
    schema.AlgorithmConfig: {
        "gamma": OBJECTIVE,
        "lam": OBJECTIVE,
        "clip_ratio": OBJECTIVE,
        "dual_clip": OBJECTIVE,
        "value_clip": OBJECTIVE,
        "entropy_coef": OBJECTIVE,
        "old_log_probs": OBJECTIVE,
        "rollout_correction": S,
        "whiten_advantages": OBJECTIVE,
        "ppo_epochs": APPLIED,
        "critic_epochs": APPLIED,
        "critic_minibatch_size": APPLIED,
        "rollout_batch_size": APPLIED,
        "samples_per_prompt": APPLIED,
        "minibatch_size": APPLIED,
        "critic_warmup_steps": APPLIED,
        "truncated": OBJECTIVE,
        "truncation_score": OBJECTIVE,
        "kl": S,
    },
    schema.PpoTrainConfig: {
        "steps": APPLIED,
        "epochs": APPLIED,
        "eval_every": OPERATION,
        "eval_function": APPLIED,
        "eval_batch": OPERATION,
        "dump_rollouts": OPERATION,
        "trace_every": OPERATION,
        "replay_rollouts": APPLIED,
    },
}
del S, START, OPERATION, APPLIED, OBJECTIVE, FORM, CONTENT

hints_of = cache(get_type_hints)
#: Sections of roles that a run trains; the others are frozen.
TRAINED = (schema.TrainedRoleConfig, schema.TrainedRewardConfig)


def rule_of(schema_class: type, field: str) -> OnResume | None:
    """Return what becomes of a change of this field; None for a field that the schema does not have.

    Args:
        schema_class: Class of the whole configuration.
        field: Dotted name; the items of a list of sections are numbered.
    """
    section, trained = schema_class, False
    parts = field.split(".")
    for depth, name in enumerate(parts):
        if name.isdecimal() and depth:
            continue
        rule = TABLE.get(section, {}).get(name)
        hint = hints_of(section).get(name)
        if rule is None or hint is None:
            return None
        inner = section_class(hint) or item_class(hint)
        if rule is not OnResume.section:
            return _of_role(rule, trained)
        assert inner is not None, f"{field}: OnResume.section is for sections"
        section, trained = inner, trained or inner in TRAINED
    return OnResume.objective  # the section itself: it is there in one configuration and not in the other


def _of_role(rule: OnResume, trained: bool) -> OnResume:
    if rule is OnResume.weights:
        return OnResume.no_effect if trained else OnResume.content
    if rule is OnResume.dtype:
        return OnResume.form if trained else OnResume.objective
    return rule


def leaves(values: dict[str, Any], section: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted field, value) of a configuration's plain values; an optional section that is not there gives None.

    Args:
        values: As YAML has them. Keys that the schema does not know are leaves, too.
        section: Class of these values.
        prefix: Dotted name of the section, with a dot at the end.
    """
    hints = hints_of(section)
    for name, value in values.items():
        field = f"{prefix}{name}"
        hint = hints.get(name)
        inner, item = (None, None) if hint is None else (section_class(hint), item_class(hint))
        if inner is not None and isinstance(value, dict):
            yield from leaves(value, inner, f"{field}.")
        elif item is not None and isinstance(value, list):
            for number, one in enumerate(value):
                yield from leaves(one, item, f"{field}.{number}.")
        else:
            yield field, value


def is_named(field: str, names: Collection[str]) -> bool:
    """Whether a field, or a section that it is in, is among ``names``."""
    parts = field.split(".")
    return any(".".join(parts[:depth]) in names for depth in range(1, len(parts) + 1))


def optional_sections(values: dict[str, Any], section: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the optional sections, and of the items of lists of sections, that are there.

    Args:
        values: As YAML has them.
        section: Class of these values.
        prefix: Dotted name of the section, with a dot at the end.
    """
    for name, hint in hints_of(section).items():
        value, inner, item = values.get(name), section_class(hint), item_class(hint)
        if inner is not None and isinstance(value, dict):
            if type(None) in get_args(hint):
                yield f"{prefix}{name}"
            yield from optional_sections(value, inner, f"{prefix}{name}.")
        elif item is not None and isinstance(value, list):
            for number, one in enumerate(value):
                yield f"{prefix}{name}.{number}"
                yield from optional_sections(one, item, f"{prefix}{name}.{number}.")

"""Rules between fields, and between fields and the machine. One small function per rule, each ValueError names the fix.

Bounds of a single field are in its metadata (``schema/option.py``) and are checked first.
``check_config`` needs the configuration and the world size alone; ``check_paths`` looks at the disk. Both run before a
model is built. Which tokenizers go together is checked in ``hetero_ppo.data.chat_template``, which can read them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hetero_ppo.config.bounds import check_bounds
from hetero_ppo.config.checks_microbatches import (
    check_interleaved_pairs,
    check_micro_batches,
    check_packing,
    check_pair_budget,
)
from hetero_ppo.config.checks_models import check_model_files
from hetero_ppo.config.checks_numerics import check_same_distribution
from hetero_ppo.config.checks_reward_function import check_function_calls
from hetero_ppo.config.checks_resume import check_allowed_changes
from hetero_ppo.config.checks_rewards import check_ensemble, check_reward_source
from hetero_ppo.config.checks_rollout import (
    check_megatron_engine,
    check_over_sampling,
    check_sampling,
    check_weight_transfer,
)
from hetero_ppo.config.derived import (
    RESPONSES_FIELDS,
    config_reward_models,
    config_roles,
    data_parallel_size,
    exact_quotient,
    longest_sequence,
    passes,
    trained_roles,
)
from hetero_ppo.config.load import AnyConfig
from hetero_ppo.config.require import require as _require
from hetero_ppo.config.schema import (
    KlController,
    OldLogProbs,
    PpoConfig,
    RmConfig,
    RolloutCorrectionKind,
    SftConfig,
)

DATA_SUFFIXES = (".jsonl", ".parquet")
RECOMPUTE_CHOICES = (None, "selective", "full")


def check_config(config: AnyConfig, world_size: int) -> None:
    """Run every rule that needs no file.

    Raises:
        ValueError: the first rule that is broken: field, value, fix.
    """
    check_bounds(config)
    for check in COMMON_CHECKS:
        check(config, world_size)
    if isinstance(config, PpoConfig):
        for ppo_check in PPO_CHECKS:
            ppo_check(config, world_size)
    else:
        for supervised_check in SUPERVISED_CHECKS:
            supervised_check(config, world_size)


def check_paths(config: AnyConfig) -> None:
    """Every file and folder that the run reads exists and is what it should be.

    Raises:
        ValueError: the first that is not.
    """
    for check in PATH_CHECKS:
        check(config)


# --- every kind of run ----------------------------------------------------------------------------------------------


def check_layout_divides_world(config: AnyConfig, world_size: int) -> None:
    for name, role in config_roles(config).items():
        data_parallel_size(name, role.parallel, world_size)


def check_expert_parallel(config: AnyConfig, world_size: int) -> None:
    """Experts are spread over the ranks of a pipeline stage, whatever else these ranks divide among them."""
    for name, role in config_roles(config).items():
        layout = role.parallel
        ranks = world_size // layout.pipeline
        _require(
            ranks % layout.expert == 0,
            f"{name}.parallel.expert",
            layout.expert,
            f"a pipeline stage has {ranks} ranks (world size {world_size} / pipeline {layout.pipeline}), which is not a "
            "multiple of it; choose a divisor",
        )


def check_sequence_parallel(config: AnyConfig, world_size: int) -> None:
    for name, role in config_roles(config).items():
        _require(
            not role.parallel.sequence or role.parallel.tensor > 1,
            f"{name}.parallel.sequence",
            role.parallel.sequence,
            f"sequence parallelism splits over the tensor-parallel ranks and {name}.parallel.tensor is 1; "
            "raise tensor or set sequence to false",
        )


def check_virtual_pipeline(config: AnyConfig, world_size: int) -> None:
    for name, role in config_roles(config).items():
        chunks = role.parallel.virtual_pipeline
        if chunks is not None:
            field = f"{name}.parallel.virtual_pipeline"
            _require(
                role.parallel.pipeline > 1,
                field,
                chunks,
                f"the interleaved schedule needs {name}.parallel.pipeline > 1; set virtual_pipeline to null",
            )


def check_schedule_ends(config: AnyConfig, world_size: int) -> None:
    for name, role in trained_roles(config).items():
        optimizer, field = role.optimizer, f"{name}.optimizer"
        _require(
            optimizer.min_lr <= optimizer.lr,
            f"{field}.min_lr",
            optimizer.min_lr,
            f"the schedule ends between 0 and {field}.lr={optimizer.lr}",
        )


def check_overlap_param_gather(config: AnyConfig, world_size: int) -> None:
    for name, role in trained_roles(config).items():
        _require(
            not role.ddp.overlap_param_gather or role.optimizer.distributed,
            f"{name}.ddp.overlap_param_gather",
            role.ddp.overlap_param_gather,
            f"parameters are gathered by the distributed optimizer alone; set {name}.optimizer.distributed=true",
        )


def check_recompute(config: AnyConfig, world_size: int) -> None:
    for name, role in trained_roles(config).items():
        _require(
            role.recompute in RECOMPUTE_CHOICES, f"{name}.recompute", role.recompute, "allowed: null, selective, full"
        )


def check_data_formats(config: AnyConfig, world_size: int) -> None:
    for field, path in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        if path is not None:
            _require(path.endswith(DATA_SUFFIXES), field, path, f"a data file ends in {' or '.join(DATA_SUFFIXES)}")


def check_checkpoint_step(config: AnyConfig, world_size: int) -> None:
    checkpoint = config.checkpoint
    _require(
        checkpoint.step is None or checkpoint.load is not None,
        "checkpoint.step",
        checkpoint.step,
        "needs checkpoint.load",
    )


def check_eval(config: AnyConfig, world_size: int) -> None:
    train = config.train
    _require(
        train.eval_every == 0 or config.data.eval is not None,
        "train.eval_every",
        train.eval_every,
        "there is nothing to evaluate on; set data.eval to a file, or train.eval_every to 0",
    )


# --- SFT and reward model -------------------------------------------------------------------------------------------


def check_global_batch(config: SftConfig | RmConfig, world_size: int) -> None:
    size = config.train.global_batch_size
    for name, role in trained_roles(config).items():
        ranks = data_parallel_size(name, role.parallel, world_size)
        exact_quotient(size, ranks, "train.global_batch_size", f"the data-parallel size of {name}")


# --- PPO ------------------------------------------------------------------------------------------------------------


def check_rollout_batch(config: PpoConfig, world_size: int) -> None:
    """Responses are dealt to the data-parallel ranks of every role, minibatches to those of the trained ones."""
    algorithm = config.algorithm
    responses = algorithm.rollout_batch_size * algorithm.samples_per_prompt
    for name, role in config_roles(config).items():
        ranks = data_parallel_size(name, role.parallel, world_size)
        exact_quotient(responses, ranks, RESPONSES_FIELDS, f"the data-parallel size of {name}")
        if name in trained_roles(config):
            of_role = passes(algorithm, name)
            exact_quotient(responses, of_role.minibatch_size, RESPONSES_FIELDS, of_role.size_field)
            exact_quotient(of_role.minibatch_size, ranks, of_role.size_field, f"the data-parallel size of {name}")


def check_mismatch(config: PpoConfig, world_size: int) -> None:
    """Engine and trainer can be compared, and corrected for, where the trainer computes log-probs of its own."""
    mismatch, correction = config.rollout.mismatch, config.algorithm.rollout_correction
    compared = config.algorithm.old_log_probs is OldLogProbs.actor
    uncompared = "with algorithm.old_log_probs=rollout there is nothing to compare; set that to actor, or this to"
    for field in ("max_log_prob_diff_mean", "max_ratio_outside_share"):
        bound = vars(mismatch)[field]
        _require(bound is None or compared, f"rollout.mismatch.{field}", bound, f"{uncompared} null")
    corrects = correction.kind is not RolloutCorrectionKind.none
    _require(compared or not corrects, "algorithm.rollout_correction.kind", correction.kind.value, f"{uncompared} none")


def check_critic_warmup(config: PpoConfig, world_size: int) -> None:
    warmup, steps = config.algorithm.critic_warmup_steps, config.train.steps
    _require(
        steps is None or warmup < steps,
        "algorithm.critic_warmup_steps",
        warmup,
        f"train.steps={steps}, so the actor would never be trained; warm up for fewer steps",
    )


def check_absent_critic(config: PpoConfig, world_size: int) -> None:
    """Refuse options of a critic that the run does not have."""
    if config.critic is not None:
        return
    for field, unset in (
        ("critic_epochs", None),
        ("critic_minibatch_size", None),
        ("critic_warmup_steps", 0),
        ("value_clip", None),
    ):
        value = vars(config.algorithm)[field]
        _require(
            value == unset,
            f"algorithm.{field}",
            value,
            "critic is null, so the run trains no values; leave it out, or give a critic",
        )


def check_adaptive_kl(config: PpoConfig, world_size: int) -> None:
    kl = config.algorithm.kl
    if kl.controller is KlController.adaptive:
        _require(
            kl.coef > 0,
            "algorithm.kl.coef",
            kl.coef,
            "the adaptive controller multiplies it, so it has to start above 0",
        )


def check_function_names(config: PpoConfig, world_size: int) -> None:
    for field, name in (
        ("reward.function", config.reward.function),
        ("train.eval_function", config.train.eval_function),
    ):
        if name is not None:
            module, colon, function = name.rpartition(":")
            _require(
                bool(colon and module and function.isidentifier()),
                field,
                name,
                "a function is named package.module:function or path/to/file.py:function",
            )
    _require(
        config.train.eval_function is None or config.data.eval is not None,
        "train.eval_function",
        config.train.eval_function,
        "there is nothing to evaluate on; set data.eval to a file of prompts",
    )


def check_sweep(config: PpoConfig, world_size: int) -> None:
    size, replayed = config.pipeline.chunk_size, config.train.replay_rollouts is not None
    _require(
        size != 0 or not replayed,
        "pipeline.chunk_size",
        size,
        "a sweep needs a generator to measure, not train.replay_rollouts",
    )


# --- the disk -------------------------------------------------------------------------------------------------------


def check_model_folders(config: AnyConfig) -> None:
    for name, role in config_roles(config).items():
        field, path = f"{name}.model.path", role.model.path
        _require(
            os.path.isdir(path), field, path, "no such folder; give a Hugging Face checkpoint folder on this machine"
        )
        read_model_config(field, path)
        _require(
            any(file.endswith(".safetensors") for file in os.listdir(path)),
            field,
            path,
            "the folder has no *.safetensors file; save the model with safetensors",
        )
        _check_file_names(field, path)
        tokenizer = role.model.tokenizer
        _require(tokenizer is None or os.path.isdir(tokenizer), f"{name}.model.tokenizer", tokenizer, "no such folder")


def _check_file_names(field: str, path: str) -> None:
    from megatron_bridge.weights.hf_checkpoint import check_names  # torch takes seconds to import

    try:
        check_names(Path(path))
    except ValueError as error:
        raise ValueError(f"{field}={path}: {error}") from error


def read_model_config(field: str, path: str) -> dict[str, Any]:
    """config.json of a checkpoint folder.

    Raises:
        ValueError: missing or not JSON.
    """
    file = os.path.join(path, "config.json")
    _require(os.path.isfile(file), field, path, "the folder has no config.json; give a Hugging Face checkpoint folder")
    try:
        with open(file, encoding="utf-8") as stream:
            return json.load(stream)
    except ValueError as error:
        raise ValueError(f"{field}={path}: config.json is not valid JSON: {error}") from error


def check_context_lengths(config: AnyConfig) -> None:
    """The longest sequence fits the positions that the model was made for (scaled RoPE is left to the user)."""
    for name, role in config_roles(config).items():
        tokens, fields = longest_sequence(config, name)
        model = read_model_config(f"{name}.model.path", role.model.path)
        scaling = model.get("rope_scaling") or model.get("rope_parameters") or {}
        if scaling.get("rope_type", scaling.get("type", "default")) == "default" and "max_position_embeddings" in model:
            limit = model["max_position_embeddings"]
            _require(
                tokens <= limit,
                fields,
                tokens,
                f"{name}.model.path has max_position_embeddings {limit}; lower the length or use a longer model",
            )


def check_data_files(config: AnyConfig) -> None:
    files = {
        "data.train": config.data.train,
        "data.eval": config.data.eval,
        "data.chat_template": config.data.chat_template,
    }
    if isinstance(config, PpoConfig):
        for name, role in config_reward_models(config).items():
            files[f"{name}.re_encode.chat_template"] = None if role.re_encode is None else role.re_encode.chat_template
    for field, path in files.items():
        if path is not None:
            _require(os.path.isfile(path), field, path, f"no such file (current folder: {os.getcwd()})")


def check_function_files(config: AnyConfig) -> None:
    if isinstance(config, PpoConfig):
        functions = {"reward.function": config.reward.function, "train.eval_function": config.train.eval_function}
        for field, name in functions.items():
            if name is not None and name.rpartition(":")[0].endswith(".py"):
                _require(os.path.isfile(name.rpartition(":")[0]), field, name, "no such Python file")


def check_run_folders(config: AnyConfig) -> None:
    _require(not os.path.isfile(config.run.dir), "run.dir", config.run.dir, "is a file; a run writes into a folder")
    load = config.checkpoint.load
    _require(load is None or os.path.isdir(load), "checkpoint.load", load, "no such run folder")
    if isinstance(config, PpoConfig):
        replay = config.train.replay_rollouts
        _require(replay is None or os.path.isdir(replay), "train.replay_rollouts", replay, "no such folder of rollouts")


COMMON_CHECKS: tuple[Callable[[AnyConfig, int], None], ...] = (
    check_layout_divides_world,
    check_expert_parallel,
    check_sequence_parallel,
    check_virtual_pipeline,
    check_micro_batches,
    check_packing,
    check_schedule_ends,
    check_overlap_param_gather,
    check_recompute,
    check_data_formats,
    check_checkpoint_step,
    check_eval,
    check_allowed_changes,
)
SUPERVISED_CHECKS: tuple[Callable[[SftConfig | RmConfig, int], None], ...] = (
    check_global_batch,
    check_pair_budget,
    check_interleaved_pairs,
)
PPO_CHECKS: tuple[Callable[[PpoConfig, int], None], ...] = (
    check_rollout_batch,
    check_mismatch,
    check_critic_warmup,
    check_absent_critic,
    check_adaptive_kl,
    check_same_distribution,
    check_reward_source,
    check_ensemble,
    check_function_names,
    check_function_calls,
    check_sampling,
    check_weight_transfer,
    check_over_sampling,
    check_sweep,
    check_megatron_engine,
)
PATH_CHECKS: tuple[Callable[[AnyConfig], None], ...] = (
    check_data_files,
    check_model_files,
    check_model_folders,
    check_context_lengths,
    check_function_files,
    check_run_folders,
)

"""Rules between fields, and between fields and the machine. One small function per rule, each ValueError names the fix.

``check_config`` needs the configuration and the world size alone; ``check_paths`` looks at the disk. Both run before a
model is built. Which tokenizers go together is checked in ``hetero_ppo.data.chat_template``, which can read them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hetero_ppo.config.checks_liveness import check_heartbeats, check_server_hangs
from hetero_ppo.config.checks_memory import check_memory
from hetero_ppo.config.checks_microbatches import (
    check_interleaved_pairs,
    check_micro_batches,
    check_packing,
    check_pair_budget,
)
from hetero_ppo.config.checks_models import check_model_files
from hetero_ppo.config.checks_numerics import check_head_init, check_kl_clamp, check_same_distribution
from hetero_ppo.config.checks_reward_function import check_function_calls
from hetero_ppo.config.checks_resume import check_allowed_changes
from hetero_ppo.config.checks_rewards import check_ensemble, check_re_encoding, check_reward_source
from hetero_ppo.config.checks_rollout import (
    check_megatron_engine,
    check_over_sampling,
    check_rollout_servers,
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


def check_layout_sizes(config: AnyConfig, world_size: int) -> None:
    for name, role in config_roles(config).items():
        for axis in ("tensor", "pipeline", "context", "expert"):
            size = vars(role.parallel)[axis]
            _require(size >= 1, f"{name}.parallel.{axis}", size, "a layout has at least 1 rank on every axis")


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
            _require(chunks > 1, field, chunks, "model chunks per pipeline rank: at least 2, or null")
            _require(
                role.parallel.pipeline > 1,
                field,
                chunks,
                f"the interleaved schedule needs {name}.parallel.pipeline > 1; set virtual_pipeline to null",
            )


def check_optimizers(config: AnyConfig, world_size: int) -> None:
    for name, role in trained_roles(config).items():
        optimizer, field = role.optimizer, f"{name}.optimizer"
        _require(optimizer.lr >= 0, f"{field}.lr", optimizer.lr, "a learning rate is not negative")
        _require(
            0 <= optimizer.min_lr <= optimizer.lr,
            f"{field}.min_lr",
            optimizer.min_lr,
            f"the schedule ends between 0 and {field}.lr={optimizer.lr}",
        )
        _require(
            optimizer.warmup_steps >= 0, f"{field}.warmup_steps", optimizer.warmup_steps, "0 or more optimizer steps"
        )
        skipped = optimizer.max_skipped_steps
        _require(skipped >= 0, f"{field}.max_skipped_steps", skipped, "0 (the first one stops the run) or more")
        _require(optimizer.weight_decay >= 0, f"{field}.weight_decay", optimizer.weight_decay, "0 or more")
        _require(0 <= optimizer.beta1 < 1, f"{field}.beta1", optimizer.beta1, "in [0, 1)")
        _require(0 <= optimizer.beta2 < 1, f"{field}.beta2", optimizer.beta2, "in [0, 1)")
        _require(optimizer.eps > 0, f"{field}.eps", optimizer.eps, "greater than 0")
        _require(optimizer.grad_clip >= 0, f"{field}.grad_clip", optimizer.grad_clip, "0 (off) or a positive norm")


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


def check_lengths(config: AnyConfig, world_size: int) -> None:
    data = config.data
    _require(data.max_prompt_tokens >= 1, "data.max_prompt_tokens", data.max_prompt_tokens, "at least 1 token")
    _require(
        data.max_sequence_tokens >= 2,
        "data.max_sequence_tokens",
        data.max_sequence_tokens,
        "at least a prompt and an answer token",
    )


def check_data_formats(config: AnyConfig, world_size: int) -> None:
    for field, path in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        if path is not None:
            _require(path.endswith(DATA_SUFFIXES), field, path, f"a data file ends in {' or '.join(DATA_SUFFIXES)}")


def check_run(config: AnyConfig, world_size: int) -> None:
    run, checkpoint = config.run, config.checkpoint
    _require(run.log_every >= 1, "run.log_every", run.log_every, "at least 1 step")
    _require(run.threads is None or run.threads >= 1, "run.threads", run.threads, "at least 1, or null")
    _require(run.timeout_minutes > 0, "run.timeout_minutes", run.timeout_minutes, "more than 0 minutes")
    phase = run.phase_timeout_minutes
    _require(phase is None or phase > 0, "run.phase_timeout_minutes", phase, "more than 0 minutes, or null")
    _require(run.stop_within_s > 0, "run.stop_within_s", run.stop_within_s, "more than 0 seconds")
    _require(checkpoint.every >= 0, "checkpoint.every", checkpoint.every, "0 (at the end alone) or a number of steps")
    _require(checkpoint.keep >= 1, "checkpoint.keep", checkpoint.keep, "at least the newest checkpoint is kept")
    _require(checkpoint.step is None or checkpoint.load is not None, "checkpoint.step", checkpoint.step, "needs checkpoint.load")


def check_there_are_steps(config: AnyConfig, world_size: int) -> None:
    train = config.train
    if train.steps is not None:
        _require(
            train.steps >= 1, "train.steps", train.steps, "a run does at least 1 step; null lets train.epochs decide"
        )
    else:
        _require(
            train.epochs >= 1,
            "train.epochs",
            train.epochs,
            "a run does at least 1 pass over the data, or set train.steps",
        )


def check_eval(config: AnyConfig, world_size: int) -> None:
    train = config.train
    _require(train.eval_every >= 0, "train.eval_every", train.eval_every, "0 or a number of steps")
    _require(
        train.eval_every == 0 or config.data.eval is not None,
        "train.eval_every",
        train.eval_every,
        "there is nothing to evaluate on; set data.eval to a file, or train.eval_every to 0",
    )


# --- SFT and reward model -------------------------------------------------------------------------------------------


def check_global_batch(config: SftConfig | RmConfig, world_size: int) -> None:
    size = config.train.global_batch_size
    _require(size >= 1, "train.global_batch_size", size, "at least 1 row per optimizer step")
    for name, role in trained_roles(config).items():
        ranks = data_parallel_size(name, role.parallel, world_size)
        exact_quotient(size, ranks, "train.global_batch_size", f"the data-parallel size of {name}")


def check_eval_batches(config: SftConfig | RmConfig, world_size: int) -> None:
    batches = config.train.eval_batches
    _require(batches is None or batches >= 1, "train.eval_batches", batches, "at least 1, or null for all of them")


def check_reward_model_loss(config: SftConfig | RmConfig, world_size: int) -> None:
    if isinstance(config, RmConfig):
        _require(config.loss.margin >= 0, "loss.margin", config.loss.margin, "0 or more")
        _require(config.loss.score_l2 >= 0, "loss.score_l2", config.loss.score_l2, "0 or more")


# --- PPO ------------------------------------------------------------------------------------------------------------


def check_rollout_batch(config: PpoConfig, world_size: int) -> None:
    """Responses are dealt to the data-parallel ranks of every role, minibatches to those of the trained ones."""
    algorithm = config.algorithm
    for field in ("rollout_batch_size", "samples_per_prompt", "minibatch_size", "ppo_epochs"):
        _require(vars(algorithm)[field] >= 1, f"algorithm.{field}", vars(algorithm)[field], "at least 1")
    for field in ("critic_epochs", "critic_minibatch_size"):
        own = vars(algorithm)[field]
        _require(own is None or own >= 1, f"algorithm.{field}", own, "at least 1, or null for the actor's")
    responses = algorithm.rollout_batch_size * algorithm.samples_per_prompt
    for name, role in config_roles(config).items():
        ranks = data_parallel_size(name, role.parallel, world_size)
        exact_quotient(responses, ranks, RESPONSES_FIELDS, f"the data-parallel size of {name}")
        if name in trained_roles(config):
            of_role = passes(algorithm, name)
            exact_quotient(responses, of_role.minibatch_size, RESPONSES_FIELDS, of_role.size_field)
            exact_quotient(of_role.minibatch_size, ranks, of_role.size_field, f"the data-parallel size of {name}")


def check_objective(config: PpoConfig, world_size: int) -> None:
    algorithm = config.algorithm
    _require(0 <= algorithm.gamma <= 1, "algorithm.gamma", algorithm.gamma, "in [0, 1]")
    _require(0 <= algorithm.lam <= 1, "algorithm.lam", algorithm.lam, "in [0, 1]")
    _require(algorithm.clip_ratio > 0, "algorithm.clip_ratio", algorithm.clip_ratio, "greater than 0")
    _require(
        algorithm.dual_clip is None or algorithm.dual_clip > 1,
        "algorithm.dual_clip",
        algorithm.dual_clip,
        "dual-clip PPO needs c > 1 (3.0 in the paper), or null to switch it off",
    )
    _require(
        algorithm.value_clip is None or algorithm.value_clip > 0,
        "algorithm.value_clip",
        algorithm.value_clip,
        "greater than 0, or null to switch it off",
    )
    _require(algorithm.entropy_coef >= 0, "algorithm.entropy_coef", algorithm.entropy_coef, "0 or more")


def check_mismatch(config: PpoConfig, world_size: int) -> None:
    """Engine and trainer can be compared, and corrected for, where the trainer computes log-probs of its own."""
    mismatch, correction = config.rollout.mismatch, config.algorithm.rollout_correction
    compared = config.algorithm.old_log_probs is OldLogProbs.actor
    uncompared = "with algorithm.old_log_probs=rollout there is nothing to compare; set that to actor, or this to"
    for field in ("max_log_prob_diff_mean", "max_ratio_outside_share"):
        bound = vars(mismatch)[field]
        _require(bound is None or bound >= 0, f"rollout.mismatch.{field}", bound, "0 or more; null for the dtype's own")
        _require(bound is None or compared, f"rollout.mismatch.{field}", bound, f"{uncompared} null")
    _require(mismatch.patience >= 1, "rollout.mismatch.patience", mismatch.patience, "at least 1 step")
    corrects = correction.kind is not RolloutCorrectionKind.none
    _require(compared or not corrects, "algorithm.rollout_correction.kind", correction.kind.value, f"{uncompared} none")
    _require(
        1 <= correction.cap < math.inf,
        "algorithm.rollout_correction.cap",
        correction.cap,
        "a finite number of at least 1: a smaller one would scale down tokens on which engine and trainer agree",
    )


def check_critic_warmup(config: PpoConfig, world_size: int) -> None:
    warmup, steps = config.algorithm.critic_warmup_steps, config.train.steps
    _require(warmup >= 0, "algorithm.critic_warmup_steps", warmup, "0 or more PPO steps")
    _require(
        steps is None or warmup < steps,
        "algorithm.critic_warmup_steps",
        warmup,
        f"train.steps={steps}, so the actor would never be trained; warm up for fewer steps",
    )


def check_trace(config: PpoConfig, world_size: int) -> None:
    every = config.train.trace_every
    _require(every >= 0, "train.trace_every", every, "0 (no traces) or a number of PPO steps")


def check_kl(config: PpoConfig, world_size: int) -> None:
    kl = config.algorithm.kl
    _require(kl.coef >= 0, "algorithm.kl.coef", kl.coef, "0 or more")
    _require(kl.loss_coef >= 0, "algorithm.kl.loss_coef", kl.loss_coef, "0 or more")
    if kl.controller is KlController.adaptive:
        _require(
            kl.coef > 0,
            "algorithm.kl.coef",
            kl.coef,
            "the adaptive controller multiplies it, so it has to start above 0",
        )
        _require(kl.target > 0, "algorithm.kl.target", kl.target, "a target above 0 nats per sequence")
        _require(kl.horizon >= 1, "algorithm.kl.horizon", kl.horizon, "at least 1 sample")


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


def check_pipeline(config: PpoConfig, world_size: int) -> None:
    """Size of a chunk."""
    size = config.pipeline.chunk_size
    fix = "at least 1, null for the engine's running batch, or 0 for a sweep"
    _require(size is None or size >= 0, "pipeline.chunk_size", size, fix)
    measures = size == 0
    replayed = config.train.replay_rollouts is not None
    _require(not (measures and replayed), "pipeline.chunk_size", size, "a sweep needs an engine, not train.replay_rollouts")
    _require(config.pipeline.sweep_s > 0, "pipeline.sweep_s", config.pipeline.sweep_s, "more than 0 seconds")


def check_residency(config: PpoConfig, world_size: int) -> None:
    residency = config.residency
    _require(residency.pcie_gb_s > 0, "residency.pcie_gb_s", residency.pcie_gb_s, "more than 0 GB/s")
    for field in ("device_gib", "host_gib"):
        size = vars(residency)[field]
        _require(size is None or size > 0, f"residency.{field}", size, "more than 0 GiB, or null for the machine's own")


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
            files[f"{name}.re_encode.chat_template"] = role.re_encode and role.re_encode.chat_template
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
    check_layout_sizes,
    check_layout_divides_world,
    check_expert_parallel,
    check_sequence_parallel,
    check_virtual_pipeline,
    check_micro_batches,
    check_packing,
    check_head_init,
    check_optimizers,
    check_overlap_param_gather,
    check_recompute,
    check_lengths,
    check_data_formats,
    check_memory,
    check_run,
    check_heartbeats,
    check_there_are_steps,
    check_eval,
    check_allowed_changes,
)
SUPERVISED_CHECKS: tuple[Callable[[SftConfig | RmConfig, int], None], ...] = (
    check_global_batch,
    check_pair_budget,
    check_interleaved_pairs,
    check_eval_batches,
    check_reward_model_loss,
)
PPO_CHECKS: tuple[Callable[[PpoConfig, int], None], ...] = (
    check_rollout_batch,
    check_objective,
    check_mismatch,
    check_critic_warmup,
    check_trace,
    check_kl,
    check_kl_clamp,
    check_same_distribution,
    check_reward_source,
    check_ensemble,
    check_re_encoding,
    check_function_names,
    check_function_calls,
    check_sampling,
    check_rollout_servers,
    check_weight_transfer,
    check_over_sampling,
    check_server_hangs,
    check_pipeline,
    check_megatron_engine,
    check_residency,
)
PATH_CHECKS: tuple[Callable[[AnyConfig], None], ...] = (
    check_data_files,
    check_model_files,
    check_model_folders,
    check_context_lengths,
    check_function_files,
    check_run_folders,
)

"""The work of ``hetero-ppo validate``: check config, data, tokenizer and template, and print what a run would do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hetero_ppo.algorithms.advantage_registry import check_advantage
from hetero_ppo.config.checks import check_config, check_paths
from hetero_ppo.config.derived import (
    config_reward_models,
    config_roles,
    data_parallel_size,
    derive_ppo,
    derive_supervised,
    trained_roles,
)
from hetero_ppo.config.devices import dtype_of
from hetero_ppo.config.load import AnyConfig, LoadedConfig, load_config
from hetero_ppo.config.schema import PpoConfig, RmConfig, SftConfig
from hetero_ppo.config.unused import unused_options
from hetero_ppo.data.chat_template import TextEncoder, check_tokenizers, load_text_encoder
from hetero_ppo.data.dataset import Dataset
from hetero_ppo.data.preference import PreferenceExample, load_preferences
from hetero_ppo.data.prompts import PromptExample, load_prompts
from hetero_ppo.data.sft import SftExample, load_sft
from hetero_ppo.memory.plan_check import check_fits
from hetero_ppo.memory.plan_limits import find_limits
from hetero_ppo.memory.plan_text import summarise
from hetero_ppo.engines.layouts import check_checkpoints, check_models_fit_layouts
from hetero_ppo.reward.function import try_function
from hetero_ppo.reward.function_pool import FunctionSpec
from hetero_ppo.reward.re_encoding import load_re_encoders
from hetero_ppo.runtime.inputs import check_inputs
from hetero_ppo.runtime.resume import beginning, read_resume
from hetero_ppo.runtime.run_folder import check_folder
from hetero_ppo.runtime.settle import settle
from hetero_ppo.table import render_table
from hetero_ppo.trainers.run_inputs import text_inputs

#: Brackets around what the loss is on, in the printed sample.
MASK_OPEN, MASK_CLOSE = "[[", "]]"
#: Kind of run -> what stands between these brackets.
MASKED = {"sft": "what the loss is on", "rm": "the two answers", "ppo": "where the response goes"}
#: Kind of run -> function that reads its data.
LOADERS: Mapping[str, Callable[..., Dataset[Any]]] = {"sft": load_sft, "rm": load_preferences, "ppo": load_prompts}
PERCENTILES = (50, 95, 100)


def print_validation(config_path: str, overrides: list[str], world_size: int, device_gib: float | None = None) -> None:
    """Check everything that can be checked without a model's weights, and print what a run would do.

    Args:
        config_path: YAML file with ``kind: sft``, ``rm`` or ``ppo``.
        overrides: Fields with other values, each as ``a.b=c``.
        world_size: Number of processes of the run.
        device_gib: Memory of one GPU of the run; None: the configuration's, or this machine's. Without any the run is one on CPUs.

    Raises:
        ValueError: A rule is broken, or a file is wrong.
        FileNotFoundError: A file is missing.
    """
    if world_size < 1:
        raise ValueError(f"--world-size {world_size}: a run has at least 1 process")
    loaded = load_config(config_path, overrides)
    limits = find_limits(loaded.config.residency, device_gib)
    on_cuda = limits.device is not None
    loaded, decided = settle(loaded, on_cuda=on_cuda)
    config = loaded.config
    check_config(config, world_size)
    check_advantage(config)
    check_paths(config)
    check_tokenizers(config)
    check_models_fit_layouts(config, on_cuda=on_cuda)
    initialised = check_checkpoints(config, on_cuda=on_cuda)
    resume = read_resume(loaded)
    check_folder(loaded)
    functions = _try_functions(config)
    memory = summarise(check_fits(config, world_size, device_gib=device_gib), limits)
    policy, role = next(iter(config_roles(config).items()))
    encoder = load_text_encoder(role.model, config.data, policy, beginning(resume).started_at)
    load = LOADERS[config.kind]
    train = load(config.data.train, config.data, encoder)
    evaluation = None if config.data.eval is None else load(config.data.eval, config.data, encoder)
    datasets = [train, *([evaluation] if evaluation is not None else [])]
    re_encoders = load_re_encoders(config_reward_models(config), config.data, encoder, datasets)
    same = check_inputs(resume, text_inputs(config, resume, encoder, train, re_encoders))
    batching = _batching(config, world_size, len(train))

    print(f"config       {loaded.source}, kind {loaded.kind}: all checks passed")
    print(_describe_encoder(encoder))
    re_encoded = [one.describe() for one in re_encoders.values()]
    print("\n".join([_describe_roles(config, world_size), *re_encoded, *functions]))
    for name, tensors in initialised.items():
        if tensors:
            print(f"{name:<12} {', '.join(tensors)} will be initialised: the checkpoint has none")
    for line in [*decided, *unused_options(loaded)]:
        print(f"note         {line}")
    print(f"\ndata\n{_table(datasets)}")
    print(
        f"\nfirst example ({MASK_OPEN}...{MASK_CLOSE}: {MASKED[config.kind]})\n{_indent(sample_text(encoder, train.examples[0]))}"
    )
    print(f"\nbatching\n{_indent(batching)}")
    print(f"\nmemory (hetero-ppo plan says more)\n{_indent(memory)}")
    if resume is not None:
        print("\n".join(["\ncheckpoint", *map(_indent, [resume.describe(), *same])]))
    print(f"\n{_what_it_does(loaded)}")


def _try_functions(config: AnyConfig) -> list[str]:
    """Import every Python function in a worker process, as a run does, and return a line for each."""
    if not isinstance(config, PpoConfig):
        return []
    reward, train = config.reward, config.train
    return [
        try_function(FunctionSpec(name, field, reward.timeout_s, reward.workers, batch, reward.concurrency))
        for field, name, batch in (
            ("reward.function", reward.function, reward.batch),
            ("train.eval_function", train.eval_function, train.eval_batch),
        )
        if name is not None
    ]


def _batching(config: AnyConfig, world_size: int, num_rows: int) -> str:
    if isinstance(config, PpoConfig):
        return derive_ppo(config, world_size, num_rows).describe()
    return derive_supervised(config, world_size, num_rows).describe()


def _describe_encoder(encoder: TextEncoder) -> str:
    tokenizer = encoder.tokenizer
    template = "none, texts are tokenised as they stand"
    if encoder.template is not None:
        template = f"sha256 {encoder.template_hash[:12]}, {len(encoder.template)} characters"
    return (
        f"tokenizer    {encoder.source}: {len(tokenizer)} tokens\n"
        f"ends         {' or '.join(map(str, encoder.end_tokens))}\ntemplate     {template}"
    )


def _describe_roles(config: AnyConfig, world_size: int) -> str:
    lines = []
    for name, role in config_roles(config).items():
        layout = role.parallel
        ranks = data_parallel_size(name, layout, world_size)
        context = f"context {layout.context} x " if layout.context > 1 else ""
        experts = f" (experts over {layout.expert})" if layout.expert > 1 else ""
        processes = f"{world_size} {'process' if world_size == 1 else 'processes'}"
        lines.append(
            f"{name:<12} {role.model.path}: {dtype_of(role.model).name}, tensor {layout.tensor} x "
            f"pipeline {layout.pipeline} x {context}data {ranks}{experts} on {processes}"
        )
    return "\n".join(lines)


def percentile(values: Sequence[int], percent: int) -> int:
    """Return the smallest value that at least ``percent`` per cent of the values do not exceed."""
    rank = -(-len(values) * percent // 100)
    return sorted(values)[max(rank, 1) - 1]


def _table(datasets: list[Dataset[Any]]) -> str:
    """Return a table with a line per file: counts of rows, percentiles of tokens."""
    head = [
        "file",
        "rows",
        "used",
        "over-long",
        "same answers",
        *(f"p{p}" for p in PERCENTILES[:-1]),
        "longest",
        "limit",
    ]
    lines = [head]
    for dataset in datasets:
        report = dataset.report
        counts = [report.num_rows, report.num_kept, report.num_overlong, report.num_identical]
        tokens = [percentile(report.token_lengths, percent) for percent in PERCENTILES]
        lines.append([report.path, *map(str, [*counts, *tokens, report.max_tokens])])
    unit = f"p50, p95, longest and limit ({datasets[0].report.limit_field}) in tokens"
    notes = [note for dataset in datasets for note in dataset.report.notes]
    return _indent("\n".join([render_table(lines, "l" + "r" * (len(head) - 1)), unit, *notes]))


def sample_text(encoder: TextEncoder, example: SftExample | PreferenceExample | PromptExample) -> str:
    """Return the text that the model reads, with special tokens, and with brackets around what the loss is on."""
    if isinstance(example, SftExample):
        return _marked(encoder, example.token_ids, example.answer_spans)
    if isinstance(example, PreferenceExample):
        sides = {"chosen": example.chosen_ids, "rejected": example.rejected_ids}
        return "\n".join(
            f"{name}: {_marked(encoder, ids, [(example.prompt_length, len(ids))])}" for name, ids in sides.items()
        )
    return _marked(encoder, example.prompt_ids, []) + MASK_OPEN + MASK_CLOSE


def _marked(encoder: TextEncoder, token_ids: list[int], spans: list[tuple[int, int]]) -> str:
    decode = encoder.tokenizer.decode
    parts, position = [], 0
    for start, end in spans:
        parts += [decode(token_ids[position:start]), MASK_OPEN, decode(token_ids[start:end]), MASK_CLOSE]
        position = end
    parts.append(decode(token_ids[position:]))
    return "".join(parts)


def _what_it_does(loaded: LoadedConfig) -> str:
    config = loaded.config
    if isinstance(config, SftConfig):
        work = f"train {config.actor.model.path} on the answers"
    elif isinstance(config, RmConfig):
        work = f"train a reward model from {config.reward.model.path} on the pairs"
    else:
        scorers = [role.model.path for role in config_reward_models(config).values()]
        trained = " and ".join(trained_roles(config))
        scored_with = " and ".join(
            [*scorers, *([config.reward.function] if config.reward.function is not None else [])]
        )
        work = f"answer the prompts with {config.actor.model.path}, score them with {scored_with}, and train {trained}"
    resume = f" It resumes from {config.checkpoint.load}." if config.checkpoint.load is not None else ""
    export = f" The trained model goes to {config.run.dir}/hf." if config.checkpoint.export_hf else ""
    return f"The run would {work}, and write to {config.run.dir}.{export}{resume} Nothing was trained now."


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())

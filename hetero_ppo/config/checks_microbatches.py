"""Rules of how batches are cut into micro-batches."""

from __future__ import annotations

from hetero_ppo.config.derived import config_roles, data_parallel_size, longest_sequence
from hetero_ppo.config.load import AnyConfig
from hetero_ppo.config.require import require
from hetero_ppo.config.schema import RmConfig, SftConfig, TrainedRoleConfig


def check_micro_batches(config: AnyConfig, world_size: int) -> None:
    for name, role in config_roles(config).items():
        budgets = {"micro_batch_tokens": role.micro_batch_tokens}
        if isinstance(role, TrainedRoleConfig):
            budgets["forward_micro_batch_tokens"] = role.forward_micro_batch_tokens
        for field, tokens in budgets.items():
            longest, fields = longest_sequence(config, name)
            require(
                tokens is None or tokens >= longest,
                f"{name}.{field}",
                tokens,
                f"a sequence may have {longest} tokens ({fields}), and a micro-batch holds one at least; raise it, or set null",
            )


def check_packing(config: AnyConfig, world_size: int) -> None:
    for name, role in config_roles(config).items():
        require(
            not role.packing or role.parallel.context == 1,
            f"{name}.packing",
            role.packing,
            f"{name}.parallel.context is {role.parallel.context}, and context parallelism cuts padded sequences alone; set packing to "
            "false, or context to 1",
        )


def check_pair_budget(config: SftConfig | RmConfig, world_size: int) -> None:
    """The loss of pairs has no mask that could hide a filler, so ranks and stages that need as many micro-batches get equal ones."""
    if not isinstance(config, RmConfig) or config.reward.micro_batch_tokens is None:
        return
    layout = config.reward.parallel
    require(
        layout.virtual_pipeline is None and layout.expert == 1,
        "reward.micro_batch_tokens",
        config.reward.micro_batch_tokens,
        "the interleaved schedule and expert parallelism need micro-batches in equal numbers, which a budget of tokens does not give "
        "to pairs; set it to null and choose reward.micro_batch_size",
    )


def check_interleaved_pairs(config: SftConfig | RmConfig, world_size: int) -> None:
    """The loss of pairs has no mask that could hide a filler, so the interleaved schedule's micro-batches have to come out even."""
    if not isinstance(config, RmConfig) or config.reward.parallel.virtual_pipeline is None:
        return
    layout, size = config.reward.parallel, config.reward.micro_batch_size
    pairs = config.train.global_batch_size // data_parallel_size("reward", layout, world_size)
    per_micro_batch = max(1, size // 2)
    require(
        pairs % (per_micro_batch * layout.pipeline) == 0,
        "reward.micro_batch_size",
        size,
        f"the interleaved schedule needs a multiple of {layout.pipeline} micro-batches of one size, and the {pairs} pairs of a "
        f"rank (train.global_batch_size) do not come out even at {per_micro_batch} pairs each; change one of the two, or set "
        "reward.parallel.virtual_pipeline to null",
    )

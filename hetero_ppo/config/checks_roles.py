"""Rules of a role: its layout, its optimizer and how it cuts batches into micro-batches."""

from __future__ import annotations

from hetero_ppo.config.derived import data_parallel_size
from hetero_ppo.config.require import require
from hetero_ppo.config.schema import ParallelConfig, RmConfig, RoleConfig, TrainedRoleConfig


def check_role(name: str, role: RoleConfig, world_size: int, longest: tuple[int, str]) -> None:
    """Raise for the first rule that a role breaks.

    Args:
        name: Path of its section.
        role: The section.
        world_size: Number of ranks of the run.
        longest: Tokens of the longest sequence that the role reads, and the fields that they come from.

    Raises:
        ValueError: A rule is broken; the message names field, value and fix.
    """
    data_parallel_size(name, role.parallel, world_size)
    check_layout(name, role.parallel, world_size)
    tokens_needed, fields = longest
    for field, tokens in role.token_budgets().items():
        require(
            tokens is None or tokens >= tokens_needed,
            f"{name}.{field}",
            tokens,
            f"a sequence may have {tokens_needed} tokens ({fields}), and a micro-batch holds one at least; raise it, or set null",
        )
    require(
        not role.packing or role.parallel.context == 1,
        f"{name}.packing",
        role.packing,
        f"{name}.parallel.context is {role.parallel.context}, and context parallelism cuts padded sequences only; set packing to "
        "false, or context to 1",
    )


def check_layout(name: str, layout: ParallelConfig, world_size: int) -> None:
    """Raise where the axes of a role's layout do not go together."""
    # Experts are spread over the ranks of a pipeline stage, however these ranks divide everything else.
    ranks = world_size // layout.pipeline
    require(
        ranks % layout.expert == 0,
        f"{name}.parallel.expert",
        layout.expert,
        f"a pipeline stage has {ranks} ranks (world size {world_size} / pipeline {layout.pipeline}), which is not a "
        "multiple of it; choose a divisor",
    )
    require(
        not layout.sequence or layout.tensor > 1,
        f"{name}.parallel.sequence",
        layout.sequence,
        f"sequence parallelism splits over the tensor-parallel ranks and {name}.parallel.tensor is 1; "
        "raise tensor or set sequence to false",
    )
    require(
        layout.virtual_pipeline is None or layout.pipeline > 1,
        f"{name}.parallel.virtual_pipeline",
        layout.virtual_pipeline,
        f"the interleaved schedule needs {name}.parallel.pipeline > 1; set virtual_pipeline to null",
    )


def check_trained_role(name: str, role: TrainedRoleConfig) -> None:
    """Raise for the first rule of optimizer and gradients that a trained role breaks."""
    optimizer = role.optimizer
    require(
        optimizer.min_lr <= optimizer.lr,
        f"{name}.optimizer.min_lr",
        optimizer.min_lr,
        f"the schedule ends between 0 and {name}.optimizer.lr={optimizer.lr}",
    )
    require(
        not role.ddp.overlap_param_gather or optimizer.distributed,
        f"{name}.ddp.overlap_param_gather",
        role.ddp.overlap_param_gather,
        f"only the distributed optimizer gathers parameters; set {name}.optimizer.distributed=true",
    )


def check_pairs(config: RmConfig, world_size: int) -> None:
    """Raise where ranks or stages need equal micro-batches and pairs do not give them.

    The loss of pairs has no mask that could hide a filler, so equal micro-batches are the only way.
    """
    role, layout = config.reward, config.reward.parallel
    require(
        role.micro_batch_tokens is None or (layout.virtual_pipeline is None and layout.expert == 1),
        "reward.micro_batch_tokens",
        role.micro_batch_tokens,
        "the interleaved schedule and expert parallelism need micro-batches in equal numbers, which a budget of tokens does not give "
        "to pairs; set it to null and choose reward.micro_batch_size",
    )
    if layout.virtual_pipeline is None:
        return
    pairs = config.train.global_batch_size // data_parallel_size("reward", layout, world_size)
    per_micro_batch = max(1, role.micro_batch_size // 2)
    require(
        pairs % (per_micro_batch * layout.pipeline) == 0,
        "reward.micro_batch_size",
        role.micro_batch_size,
        f"the interleaved schedule needs a multiple of {layout.pipeline} micro-batches of one size, and the {pairs} pairs of a "
        f"rank (train.global_batch_size) do not come out even at {per_micro_batch} pairs each; change one of the two, or set "
        "reward.parallel.virtual_pipeline to null",
    )

"""Rules between fields, and between fields and the machine.

Bounds of a single field are in its metadata (``schema/option.py``) and are checked first. ``check_config`` needs only the
configuration and the world size; ``check_paths`` looks at the disk. Both run before a model is built. A rule raises a ``ValueError``
that names field, value and fix. ``hetero_ppo.data.chat_template`` checks which tokenizers go together, since it can read them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hetero_ppo.config.bounds import check_bounds
from hetero_ppo.config.checks_disk import check_data_files, check_ppo_files, check_run_folders
from hetero_ppo.config.checks_models import check_context_length, check_model_folder
from hetero_ppo.config.checks_ppo import check_ppo
from hetero_ppo.config.checks_resume import check_allowed_changes, check_checkpoint_step
from hetero_ppo.config.checks_roles import check_pairs, check_role, check_trained_role
from hetero_ppo.config.derived import (
    config_roles,
    data_parallel_size,
    exact_quotient,
    longest_sequence,
    trained_roles,
)
from hetero_ppo.config.load import AnyConfig
from hetero_ppo.config.require import require
from hetero_ppo.config.schema import RmConfig, SftConfig


def check_config(config: AnyConfig, world_size: int) -> None:
    """Raise for the first rule that a configuration breaks, without a look at the disk.

    Args:
        config: Configuration of the run.
        world_size: Number of ranks of the run.

    Raises:
        ValueError: A rule is broken; the message names field, value and fix.
    """
    check_bounds(config)
    for name, role in config_roles(config).items():
        check_role(name, role, world_size, longest_sequence(config, name))
    for name, trained in trained_roles(config).items():
        check_trained_role(name, trained)
    check_checkpoint_step(config.checkpoint)
    check_allowed_changes(config.checkpoint, type(config))
    require(
        config.train.eval_every == 0 or config.data.eval is not None,
        "train.eval_every",
        config.train.eval_every,
        "there is nothing to evaluate on; set data.eval to a file, or train.eval_every to 0",
    )
    CHECKS_OF_KIND[config.kind](config, world_size)


def check_paths(config: AnyConfig) -> None:
    """Raise for the first file or folder that the run reads and that is missing or wrong.

    Raises:
        ValueError: The message names field, path and fix.
    """
    check_data_files(config.data)
    for name, role in config_roles(config).items():
        check_model_folder(name, role.model)
        check_context_length(name, role.model, longest_sequence(config, name))
    check_run_folders(config.run, config.checkpoint)
    for check in PATH_CHECKS_OF_KIND[config.kind]:
        check(config)


def check_sft(config: SftConfig, world_size: int) -> None:
    """Raise for the first rule that an SFT run breaks and other kinds of runs do not have."""
    check_global_batch(config, world_size)


def check_rm(config: RmConfig, world_size: int) -> None:
    """Raise for the first rule that a reward-model run breaks and other kinds of runs do not have."""
    check_global_batch(config, world_size)
    check_pairs(config, world_size)


def check_global_batch(config: SftConfig | RmConfig, world_size: int) -> None:
    """Raise where the global batch does not divide into equal shares of the data-parallel ranks."""
    size = config.train.global_batch_size
    for name, role in trained_roles(config).items():
        ranks = data_parallel_size(name, role.parallel, world_size)
        exact_quotient(size, ranks, "train.global_batch_size", f"the data-parallel size of {name}")


#: Kind of run -> its own rules.
CHECKS_OF_KIND: Mapping[str, Callable[[Any, int], None]] = {"sft": check_sft, "rm": check_rm, "ppo": check_ppo}
#: Kind of run -> its own rules of files and folders.
PATH_CHECKS_OF_KIND: Mapping[str, Sequence[Callable[[Any], None]]] = {"sft": (), "rm": (), "ppo": (check_ppo_files,)}

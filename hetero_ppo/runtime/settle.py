"""Decide the dtypes that a configuration leaves to the device, before anything is checked, compared with a checkpoint or saved."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from hetero_ppo.config.derived import config_roles
from hetero_ppo.config.devices import default_dtype
from hetero_ppo.config.load import AnyConfig, LoadedConfig
from hetero_ppo.config.schema import Dtype


def settle(loaded: LoadedConfig, *, on_cuda: bool) -> tuple[LoadedConfig, list[str]]:
    """Return the configuration with a dtype for every role, and one line for each decision.

    A run that continues from a checkpoint keeps the checkpoint's dtypes on every device: trained roles are stored in that form, and frozen
    ones compute the objective.

    Args:
        loaded: Configuration as it was read.
        on_cuda: Whether the run computes on GPUs.
    """
    open_fields = [
        f"{name}.model.dtype" for name, role in config_roles(loaded.config).items() if role.model.dtype is None
    ]
    if not open_fields:
        return loaded, []
    node, default, saved = copy.deepcopy(loaded.node), default_dtype(on_cuda=on_cuda), _checkpoint_values(loaded.config)
    decided: dict[Dtype, list[str]] = {}
    for field in open_fields:
        there = _value(saved, field)
        dtype = default if there is None else Dtype(there)
        OmegaConf.update(node, field, dtype)
        decided.setdefault(dtype, []).append(field)
    device = "CUDA" if on_cuda else "a CPU"
    lines = [
        f"{dtype.value} for {', '.join(fields)}: the default on {device}"
        if dtype is default
        else f"{dtype.value} for {', '.join(fields)}: as in the checkpoint; the default on {device} is {default.value}"
        for dtype, fields in decided.items()
    ]
    config: Any = OmegaConf.to_object(node)  # omegaconf does not know which class it makes
    return dataclasses.replace(loaded, config=config, node=node), lines


def _checkpoint_values(config: AnyConfig) -> dict[str, Any]:
    """Return the configuration of the checkpoint that the run continues from; empty without one, or if it cannot be read."""
    if config.checkpoint.load is None:
        return {}
    # Megatron-Core takes seconds to import. So a new run, which does not need it here, reports its errors first.
    from hetero_ppo.checkpoint.manager import checkpoint_folder
    from hetero_ppo.runtime.resume import saved_config

    run_dir = Path(config.checkpoint.load)
    try:
        folder = checkpoint_folder(run_dir, config.checkpoint.step)
    except ValueError:
        return {}  # ``read_resume`` reports what is wrong with it
    return saved_config(folder, run_dir)[0] or {}


def _value(values: Any, field: str) -> Any:
    """Return the value of a dotted field; None where it is not there. The items of a list of sections are numbered."""
    for name in field.split("."):
        if isinstance(values, list):
            values = values[int(name)] if int(name) < len(values) else None
        else:
            values = (values or {}).get(name)
    return values

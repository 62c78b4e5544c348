"""Defaults that go by the device that a run computes on: ``null`` in a configuration, a value in what the run saves."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from hetero_ppo.config.schema import Dtype, ModelConfig, RoleConfig

R = TypeVar("R", bound=RoleConfig)


def default_dtype(*, on_cuda: bool) -> Dtype:
    """Return the dtype of a model that names none: GPUs are made for bf16, and most CPUs compute fp32 as fast or faster."""
    return Dtype.bf16 if on_cuda else Dtype.fp32


def with_dtype(role: R, *, on_cuda: bool) -> R:
    """Return a role whose model names its dtype; the role itself where it does already."""
    if role.model.dtype is not None:
        return role
    return dataclasses.replace(role, model=dataclasses.replace(role.model, dtype=default_dtype(on_cuda=on_cuda)))


def dtype_of(model: ModelConfig) -> Dtype:
    """Return the dtype of a model in a settled configuration, where none is left open."""
    assert model.dtype is not None, f"{model.path}: the dtype is open; runtime.settle decides it when a run begins"
    return model.dtype

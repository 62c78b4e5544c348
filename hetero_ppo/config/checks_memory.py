"""Rules for what a CUDA device holds beside tensors, as the memory plan counts it."""

from __future__ import annotations

import dataclasses
import math

from hetero_ppo.config.load import AnyConfig
from hetero_ppo.config.require import require


def check_memory(config: AnyConfig, world_size: int) -> None:
    """Raise ValueError for a size that no device can have."""
    for field in dataclasses.fields(config.memory):
        value = vars(config.memory)[field.name]
        require(math.isfinite(value) and value >= 0, f"memory.{field.name}", value, "0 or more")
    slack = config.memory.allocator_slack
    require(slack < 1, "memory.allocator_slack", slack, "a share of the tensors' bytes, below 1")

"""What a GPU check is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class Skip(Exception):
    """A check can't run here; the message says why."""


@dataclass(frozen=True)
class Check:
    """One check of ``scripts/gpu_check.sh``."""

    name: str
    proves: str
    timeout_s: float
    run: Callable[[bool], dict[str, Any]]  # (rehearsed on the CPU) -> what was measured; raises when it fails
    on_cpu: bool = True  # it can be rehearsed

"""The group of a run of one process, for unit tests that join no world: with one rank nothing is sent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

ONE_RANK: Any = SimpleNamespace(rank=lambda: 0, size=lambda: 1)

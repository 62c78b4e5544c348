"""Scores from a Python function instead of a reward model."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hetero_ppo.types import Rollout

#: (prompt text, response text, label, metadata) -> score
RewardFunction = Callable[[str, str, Any, dict[str, Any]], float]


def load_function(spec: str, field: str) -> RewardFunction:
    """Import ``package.module:function`` or ``path/to/file.py:function``.

    Args:
        spec: the config value.
        field: the config field that holds it, for messages.

    Raises:
        ValueError: no such file, module or function.
    """
    target, _, name = spec.rpartition(":")
    if not target:
        raise ValueError(f"{field} is {spec!r}: write it as package.module:function or path/to/file.py:function")
    if target.endswith(".py"):
        path = Path(target)
        if not path.is_file():
            raise ValueError(f"{field} is {spec!r}: no file {path}")
        # Named by its path: its stem may be another module's name.
        module_spec = importlib.util.spec_from_file_location(str(path.resolve()), path)
        assert module_spec is not None and module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[module_spec.name] = module  # dataclasses look up the module that defines them
        module_spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(target)
        except ModuleNotFoundError as error:
            raise ValueError(f"{field} is {spec!r}: no module {error.name!r}") from error
    if not callable(vars(module).get(name)):
        raise ValueError(f"{field} is {spec!r}: {target} has no function {name!r}")
    return vars(module)[name]


class FunctionReward:
    """Calls the function on rank 0 and hands the scores to every rank, so that they cannot differ between ranks."""

    def __init__(self, spec: str, decode: Callable[[list[int]], str], field: str = "reward.function") -> None:
        self.spec = spec
        self.field = field
        self._function = load_function(spec, field)
        self._decode = decode

    def score(self, rollout: Rollout) -> Tensor:
        """[B] float32 scores of the responses. Collective over the world.

        Raises:
            ValueError: the function gave something that is not a finite number.
        """
        scores = torch.zeros(rollout.batch_size, dtype=torch.float32)
        if dist.get_rank() == 0:
            scores = torch.tensor([self._score_row(rollout, row) for row in range(rollout.batch_size)])
        if dist.get_world_size() > 1:
            dist.broadcast(scores, 0)
        return scores

    def _score_row(self, rollout: Rollout, row: int) -> float:
        start, end = int(rollout.prompt_lengths[row]), int(rollout.sequence_lengths[row])
        ids = rollout.token_ids[row].tolist()
        response = self._decode(ids[start:end])
        score = self._function(rollout.prompt_texts[row], response, rollout.labels[row], rollout.metadata[row])
        if not isinstance(score, (int, float)) or not math.isfinite(score):
            raise ValueError(
                f"{self.field} {self.spec} gave {score!r} for dataset row {rollout.prompt_index[row]} "
                f"(response {response[:80]!r}): it must return a finite number"
            )
        return float(score)

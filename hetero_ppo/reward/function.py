"""Scores from a Python function instead of a reward model, which may raise, hang, or give what is no score."""

from __future__ import annotations

import importlib
import importlib.util
import math
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hetero_ppo.config.schema import RewardErrors
from hetero_ppo.errors import RunError
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


class _Caller:
    """Calls the function in a thread, which is left behind when a call does not end."""

    def __init__(self, function: RewardFunction) -> None:
        self._function = function
        self._calls: queue.SimpleQueue[tuple[Any, ...]] | None = None

    def __call__(self, arguments: tuple[Any, ...], timeout_s: float) -> Any:
        """What the function gives; raises what it raises, or TimeoutError."""
        if self._calls is None:
            self._calls, self._answers = queue.SimpleQueue(), queue.SimpleQueue[tuple[Any, Exception | None]]()
            work = (self._calls, self._answers)
            threading.Thread(target=self._work, args=work, name="reward-function", daemon=True).start()
        self._calls.put(arguments)
        try:
            score, error = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            self._calls = None  # the next call gets a thread of its own
            raise TimeoutError(f"it did not end within reward.timeout_s={timeout_s:g}") from None
        if error is not None:
            raise error
        return score

    def _work(self, calls: queue.SimpleQueue[tuple[Any, ...]], answers: queue.SimpleQueue[tuple[Any, Any]]) -> None:
        while True:
            try:
                answers.put((self._function(*calls.get()), None))
            except Exception as error:  # noqa: BLE001  the caller raises it
                answers.put((None, error))


class FunctionReward:
    """Calls the function on rank 0 and hands the scores to every rank, so that they cannot differ between ranks."""

    def __init__(
        self,
        spec: str,
        decode: Callable[[list[int]], str],
        field: str = "reward.function",
        *,
        timeout_s: float = math.inf,
        on_error: RewardErrors = RewardErrors.stop,
    ) -> None:
        """
        Args:
            spec: where the function is, ``load_function``.
            decode: token ids to text.
            field: the config field that holds ``spec``, for messages.
            timeout_s: of one call; infinity: the call is made in the caller's thread.
            on_error: what becomes of a response without a score.
        """
        self.spec = spec
        self.field = field
        self.timeout_s = timeout_s
        self.on_error = on_error
        self._function = load_function(spec, field)
        self._caller = _Caller(self._function)
        self._decode = decode

    def score(self, rollout: Rollout) -> Tensor:
        """[B] float32 scores of the responses; with ``on_error=exclude`` NaN where there is none. Collective over the world.

        Raises:
            RunError: the function raised, did not end in time, or gave something that is not a finite number.
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
        arguments = (rollout.prompt_texts[row], response, rollout.labels[row], rollout.metadata[row])
        about = f"for dataset row {rollout.prompt_index[row]} (response {response[:80]!r})"
        try:
            score = self._function(*arguments) if self.timeout_s == math.inf else self._caller(arguments, self.timeout_s)
        except Exception as error:
            if self.on_error is RewardErrors.exclude:
                return math.nan
            raise RunError(
                f"{self.field} {self.spec} failed {about}: {type(error).__name__}: {error}. "
                "With reward.on_error=exclude such responses are left out and counted"
            ) from error
        if isinstance(score, (int, float)) and math.isfinite(score):
            return float(score)
        if self.on_error is RewardErrors.exclude:
            return math.nan
        raise RunError(f"{self.field} {self.spec} gave {score!r} {about}: it must return a finite number")

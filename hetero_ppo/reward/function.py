"""Scores from a Python function instead of a reward model. The function may raise, hang, crash, or return something that is not a score."""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hetero_ppo.config.schema import RewardErrors
from hetero_ppo.distributed.text import broadcast_json
from hetero_ppo.errors import RunError
from hetero_ppo.reward.function_pool import Failure, FailureKind, FunctionPool, FunctionSpec, LoadedFunction, Ticket
from hetero_ppo.types import Rollout

log = logging.getLogger(__name__)

#: Seconds between two reports of progress while a batch is scored.
PROGRESS_S = 2.0
#: Kinds of failures; a broadcast carries the index plus 1, and 0 for a score.
KINDS = tuple(FailureKind)


@dataclass
class PendingScores:
    """Scores of one rollout that workers compute; ``result`` waits for them."""

    reward: FunctionReward
    rollout: Rollout
    ticket: Ticket | None = None  # only on rank 0
    problem: str = ""  # reason why rank 0 has no ticket

    def result(self) -> Tensor:
        """Return the scores, [B] float32, once they are there. With ``on_error=exclude`` a response without a score gets NaN. Collective over the world.

        Raises:
            RunError: The function raised, did not end in time, crashed, or returned something that is not a finite number.
        """
        return self.reward.finish(self)


class FunctionReward:
    """A reward function. Worker processes of rank 0 call it and every rank gets the same scores."""

    def __init__(
        self,
        spec: str,
        decode: Callable[[list[int]], str],
        field: str = "reward.function",
        *,
        timeout_s: float,
        on_error: RewardErrors = RewardErrors.stop,
        workers: int | None = None,
        batch: int | None = None,
        concurrency: int | None = None,
        world: dist.ProcessGroup,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Take the settings; no process is started.

        Args:
            spec: Location of the function: ``package.module:function`` or ``path/to/file.py:function``.
            decode: Function from token ids to text.
            field: Config field that holds ``spec``, for messages.
            timeout_s: Most seconds that one call may take.
            on_error: Treatment of a response without a score.
            workers: Most worker processes; None: derived.
            batch: Number of responses per call, which then gets lists; None: one response per call.
            concurrency: Number of concurrent calls in one worker, for an ``async def`` function; None: derived.
            world: Group of all ranks; rank 0 has the workers.
            progress: Function that every rank calls while it waits for scores.
        """
        self.spec = FunctionSpec(spec, field, timeout_s, workers, batch, concurrency)
        self.on_error = on_error
        self.last_failure = ""
        self._decode = decode
        self._progress = progress
        self._world = world
        self._pool: FunctionPool | None = None
        self._counts: Counter[FailureKind] = Counter()
        self._reported: set[FailureKind] = set()

    def open(self) -> None:
        """Start the first worker, on rank 0. Returns at once."""
        if self._pool is None and self._world.rank() == 0:
            self._pool = FunctionPool(self.spec)
            weakref.finalize(self, self._pool.close)
            self._pool.open()

    def check(self) -> None:
        """Wait until the function is imported. Collective over the world.

        Raises:
            ValueError: The function cannot be imported or called this way, or ``concurrency`` is set and it is not ``async def``.
        """
        self.open()
        problem = ""
        if self._pool is not None:
            try:
                check_concurrency(self.spec, self._pool.loaded())
            except ValueError as error:
                problem = str(error)
        if self._world.size() > 1:
            problem = broadcast_json(problem, 0, self._world)
        if problem:
            self.close()
            raise ValueError(problem)

    def describe(self) -> str:
        """Return a line about how the function is called. Call it on rank 0."""
        assert self._pool is not None
        return describe(self.spec, self._pool.loaded())

    def close(self) -> None:
        """End the workers. Safe to call twice."""
        if self._pool is not None:
            self._pool.close()

    def score(self, rollout: Rollout) -> Tensor:
        """Return [B] float32 scores of the responses, as ``PendingScores.result`` does. Collective over the world."""
        return self.start(rollout).result()

    def start(self, rollout: Rollout) -> PendingScores:
        """Give the responses to the workers. Returns at once."""
        self.open()
        pending = PendingScores(self, rollout)
        if self._pool is not None:
            try:
                pending.ticket = self._submit(self._pool, rollout)
            except TypeError as error:  # ``result`` raises it on every rank
                pending.problem = f"{self.spec.field} {self.spec.spec}: in a label or in metadata {error}"
        return pending

    def _submit(self, pool: FunctionPool, rollout: Rollout) -> Ticket:
        columns: tuple[list[Any], ...] = (
            rollout.prompt_texts,
            [self._response(rollout, row) for row in range(rollout.batch_size)],
            rollout.labels,
            rollout.metadata,
        )
        rows = range(rollout.batch_size)
        calls: list[tuple[list[Any], Sequence[int]]]
        if self.spec.batch is None:
            calls = [([column[row] for column in columns], (row,)) for row in rows]
        else:
            parts = [rows[start : start + self.spec.batch] for start in range(0, len(rows), self.spec.batch)]
            calls = [([[column[row] for row in part] for column in columns], part) for part in parts]
        return pool.submit(calls, rollout.batch_size)

    def _response(self, rollout: Rollout, row: int) -> str:
        start, end = int(rollout.prompt_lengths[row]), int(rollout.sequence_lengths[row])
        return self._decode(rollout.token_ids[row, start:end].tolist())

    def finish(self, pending: PendingScores) -> Tensor:
        """Wait for the scores of a ``start`` (``PendingScores.result``)."""
        problem, note = self._wait(pending), ""
        num_rows = pending.rollout.batch_size
        scores, kinds = torch.full((num_rows,), math.nan), torch.zeros(num_rows, dtype=torch.int64)
        outcomes = [] if pending.ticket is None or problem else pending.ticket.outcomes
        for row, outcome in enumerate(outcomes):
            if isinstance(outcome, float):
                scores[row] = outcome
            elif outcome is not None:
                kinds[row] = 1 + KINDS.index(outcome.kind)
                self._report(outcome.kind, self._describe_failure(pending.rollout, row, outcome))
                if self.on_error is RewardErrors.stop and not problem:
                    problem, note = self.last_failure, outcome.traceback
        if pending.ticket is not None and problem:
            pending.ticket.cancel()
        if self._world.size() > 1:
            problem, self.last_failure = broadcast_json([problem, self.last_failure], 0, self._world)
            for tensor in (scores, kinds):
                dist.broadcast(tensor, 0, group=self._world)
        if problem:
            error = RunError(problem)
            if note:
                error.add_note(note)
            raise error
        self._counts.update(KINDS[kind - 1] for kind in kinds.tolist() if kind)
        return scores

    def _wait(self, pending: PendingScores) -> str:
        """Wait until all scores are there, or one is missing and that stops the run. Meanwhile every rank reports progress. Collective.

        Returns:
            Reason why the workers cannot make calls, on rank 0; empty if they can.
        """
        is_over, problem = False, pending.problem
        while not is_over:
            self._progress()
            if problem:
                is_over = True
            elif pending.ticket is not None:
                try:
                    is_over = pending.ticket.wait(PROGRESS_S, until_failure=self.on_error is RewardErrors.stop)
                except RunError as error:
                    is_over, problem = True, str(error)
            if self._world.size() > 1:
                status = torch.tensor([int(is_over)])
                dist.broadcast(status, 0, group=self._world)
                is_over = bool(status)
        return problem

    def _describe_failure(self, rollout: Rollout, row: int, failure: Failure) -> str:
        response = self._response(rollout, row)
        about = f"for dataset row {rollout.prompt_index[row]} (response {response[:80]!r})"
        named = f"{self.spec.field} {self.spec.spec}"
        advice = "With reward.on_error=exclude such responses are left out and counted"
        if failure.kind is FailureKind.bad_score:
            needed = "a finite number" if self.spec.batch is None else "a finite number for every response"
            detail = f"{failure.detail}; " if failure.detail else ""
            text = f"{named} gave {failure.text} {about}: {detail}it must return {needed}, for example float(score)"
        else:
            text = f"{named} failed {about}: {failure.text}"
        return f"{text}. {advice}" if self.on_error is RewardErrors.stop else text

    def _report(self, kind: FailureKind, text: str) -> None:
        self.last_failure = text
        if self.on_error is RewardErrors.exclude and kind not in self._reported:
            self._reported.add(kind)
            log.warning(f"{text}. The response is left out; further ones are counted in {_metric(kind)}")

    def collect(self) -> dict[str, float]:
        """Return the number of responses without a score since the last call, by kind; {} if a failure stops the run."""
        if self.on_error is RewardErrors.stop:
            return {}
        counts, self._counts = self._counts, Counter()
        return {_metric(kind): float(counts[kind]) for kind in KINDS}


def _metric(kind: FailureKind) -> str:
    return f"reward/function/num_{kind.value}"


def check_concurrency(spec: FunctionSpec, loaded: LoadedFunction) -> None:
    """Raise ValueError when ``concurrency`` is set for a function that is not ``async def``."""
    if spec.concurrency is not None and not loaded.is_async:
        raise ValueError(
            f"reward.concurrency is {spec.concurrency}, but {spec.field} {spec.spec} is not `async def`, so a worker makes one "
            "call at a time: leave it out, or set reward.workers"
        )


def describe(spec: FunctionSpec, loaded: LoadedFunction) -> str:
    """Return a line about how a function is called."""
    rows = "one response a call" if spec.batch is None else f"up to {spec.batch} responses a call"
    at_once = f", {loaded.concurrency} calls at once in each" if loaded.is_async else ""
    source = "derived" if spec.num_workers is None else "reward.workers"
    return (
        f"{spec.field} {spec.spec}: {rows}, {spec.timeout_s:g} s at most; up to {loaded.num_workers} worker "
        f"process{'' if loaded.num_workers == 1 else 'es'} ({source}){at_once}"
    )


def try_function(spec: FunctionSpec) -> str:
    """Import a function in a worker, as a run does, and return the line about how it would be called.

    Raises:
        ValueError: The function cannot be imported or called this way.
    """
    start = time.monotonic()
    pool = FunctionPool(spec)
    pool.open()
    try:
        loaded = pool.loaded()
        check_concurrency(spec, loaded)
        return f"{describe(spec, loaded)}; imported in {time.monotonic() - start:.1f} s"
    finally:
        pool.close()

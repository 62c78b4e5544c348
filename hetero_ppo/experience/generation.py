"""A rollout under way: the engine answers in a thread of its own, and chunks of complete responses reach every rank."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hetero_ppo.config.derived import chunk_sizes
from hetero_ppo.config.schema import SamplingConfig
from hetero_ppo.distributed.text import broadcast_json
from hetero_ppo.errors import RunError
from hetero_ppo.experience.bank import RolloutBank
from hetero_ppo.experience.rollouts import build_rollout
from hetero_ppo.observability.trace import ENGINE, TRAINER, WAIT_FOR_ENGINE, TraceRecorder
from hetero_ppo.types import Chunk, OnResponse, PromptBatch, Response, Rollout

#: In place of a number of responses: the engine waits for its restart.
RESTART = -1
#: Label of the newest weights of a response, and (label, tokens) of those before, oldest first.
Versions = tuple[str, list[tuple[str, int]]]


class Generator(Protocol):
    """What a rollout engine offers here."""

    @property
    def is_collective(self) -> bool:
        """True when it is on every rank, and answers nothing beside what else the ranks do together."""
        ...

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        *,
        n: int,
        seed: int,
        max_tokens: list[int] | None = None,
        on_response: OnResponse | None = None,
        begun: list[Response | None] | None = None,
        wanted: int | None = None,
    ) -> list[list[Response]]: ...


class Generation:
    """Answers prompts, chunk by chunk. Responses are cut into chunks in the order of their completion.

    Args:
        engine: on rank 0, and None on the others; on every rank where it is collective.
        prompts: P prompts, the same on every rank.
        sampling: how to sample.
        n: responses per prompt; row p * n + j of the rollout is response j of prompt p.
        seed: of this rollout.
        version: label of the weights that the engine holds.
        chunk_size: responses of a chunk; the last ones have fewer (``derived.chunk_sizes``).
        max_tokens: response tokens of each prompt; None: ``sampling.max_tokens`` for all.
        begun: for each response (p * n + j) what there is of it, or None. None: nothing was begun.
        wanted: rows of the rollout; they are the responses that are complete first, in the order of completion. The others are
            aborted, and are in :meth:`unused`. None: all.
        bank: on the engine's rank, begun for this step; takes every response that completes. None: none is kept.
        banked: (p * n + j, response) of what the bank had: complete before the others, in this order, and not asked for again.
        restart: collective over the world; gives the devices to the engine and restarts its dead servers. Called when the engine has
            no server left that may answer. None: that cannot happen.
        trace: takes the engine's time.
    """

    def __init__(
        self,
        engine: Generator | None,
        prompts: PromptBatch,
        sampling: SamplingConfig,
        *,
        n: int,
        seed: int,
        version: str,
        chunk_size: int,
        max_tokens: list[int] | None = None,
        begun: list[Response | None] | None = None,
        wanted: int | None = None,
        bank: RolloutBank | None = None,
        banked: Sequence[tuple[int, Response]] = (),
        restart: Callable[[], None] | None = None,
        trace: TraceRecorder | None = None,
    ) -> None:
        self.prompts = prompts
        self.sampling = sampling
        self.n = n
        self.version = version
        self.num_rows = len(prompts) * n if wanted is None else wanted
        self.seconds = 0.0  # of the engine, on rank 0
        self._arguments: dict[str, Any] = {"n": n, "seed": seed, "max_tokens": max_tokens, "on_response": self._note}
        if banked:
            begun = list(begun) if begun is not None else [None] * (len(prompts) * n)
            for place, response in banked:
                begun[place] = response
        if begun is not None:
            self._arguments["begun"] = begun
        if wanted is not None:
            self._arguments["wanted"] = wanted
        if restart is not None:
            self._arguments["on_stalled"] = self._note_stall
        self._restart = restart
        self._stalled = False  # the engine waits for its restart
        self._begun = begun
        self._bank = bank
        self._banked = {place for place, _ in banked}
        self._partial = wanted is not None
        self._engine = engine
        self._trace = trace or TraceRecorder()
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._complete: list[tuple[int, int, Response]] = []  # (row, place, response) in the order of completion
        self._answers: list[list[Response]] = []  # of the engine
        self._error: BaseException | None = None
        for place, response in banked:
            self._complete.append((len(self._complete) if self._partial else place, place, response))
        # What every rank has been told, by row.
        self._num_told = 0
        self._sizes = chunk_sizes(self.num_rows, chunk_size)  # of the chunks that were not handed out
        self._num_chunks = 0
        width = sampling.max_tokens if max_tokens is None else max(max_tokens)
        self._lengths = torch.zeros(self.num_rows, dtype=torch.int64)
        self._truncated = torch.zeros(self.num_rows, dtype=torch.bool)
        self._tokens = torch.zeros(self.num_rows, width, dtype=torch.int64)
        self._log_probs = torch.zeros(self.num_rows, width, dtype=torch.float32)
        self._chunk_of = [0] * self.num_rows
        self._place = list(range(self.num_rows))  # of a row's prompt and sample: p * n + j
        self._versions: list[Versions] = [(version, [])] * self.num_rows

    def start(self) -> Generation:
        """Let the engine begin; a collective one has answered everything when this returns."""
        if self._engine is not None and self._engine.is_collective:
            self._generate()
        elif self._engine is not None:
            self._thread = threading.Thread(target=self._generate, name="generation", daemon=True)
            self._thread.start()
        return self

    @property
    def finished(self) -> bool:
        """True when every response has been handed out in a chunk; the same on every rank."""
        return self._num_told == self.num_rows

    @property
    def max_columns(self) -> int:
        """T at most: predicted tokens of the longest prompt with the longest response that is allowed."""
        return max(len(ids) for ids in self.prompts.prompt_ids) + self._tokens.shape[1] - 1

    def next_chunks(self, *, wait_for_all: bool = False) -> list[Chunk]:
        """The chunks that are complete and were not handed out yet, at least one. Collective over the world; blocks.

        Args:
            wait_for_all: until the engine has answered everything.

        Raises:
            RunError: an answer was made by other weights than ``version``; and whatever the engine raised.
        """
        assert not self.finished, "all chunks have been handed out"
        while True:
            fresh = self._wait(wait_for_all) if self._engine is not None else []
            count = torch.tensor([RESTART if fresh is None else len(fresh)])
            if dist.get_world_size() > 1:
                dist.broadcast(count, 0)
            if int(count) != RESTART:
                break
            self._stalled = False
            self._restart()
        rows, part = self._share(fresh, int(count))
        for own, values in zip((self._lengths, self._truncated, self._tokens, self._log_probs), part, strict=True):
            own[rows] = values
        if self._partial:
            self._share_origins(rows, fresh)
        self._num_told += int(count)
        chunks = []
        for part in rows.split(self._take_sizes(int(count))):
            taken = sorted(part.tolist())
            for row in taken:
                self._chunk_of[row] = self._num_chunks
            chunks.append(Chunk(self._num_chunks, taken, self._rollout_of(taken)))
            self._num_chunks += 1
        if self.finished and self._thread is not None:
            self._thread.join()
            self._raise_error()
        return chunks

    def rollout(self) -> Rollout:
        """All rows, in the order of the prompts."""
        assert self.finished, "responses are missing"
        return replace(self._rollout_of(list(range(self.num_rows))), chunk_index=list(self._chunk_of))

    def unused(self) -> tuple[set[int], dict[int, Response]]:
        """Places of the prompts whose responses are in the rollout; the responses of the others, on the engine's rank alone."""
        assert self.finished and self.n == 1, "only single responses can be begun"
        used = set(self._place)
        rest = {place: group[0] for place, group in enumerate(self._answers) if place not in used}
        return used, rest

    def metrics(self) -> dict[str, float]:
        """How old the weights are that made the rollout, where that is not one version by design; what came from the bank."""
        banked = {"rollout/banked_share": len(self._banked) / self.num_rows} if self._banked else {}
        if not self._partial:
            return banked
        older = torch.tensor([sum(count for _, count in earlier) for _, earlier in self._versions])
        older = torch.where(torch.tensor([v != self.version for v, _ in self._versions]), self._lengths, older)
        return banked | {
            "rollout/resumed_share": float((older > 0).float().mean()),
            "rollout/stale_token_share": float(older.sum() / self._lengths.sum()),
            "rollout/weight_versions_max": float(max(1 + len(earlier) for _, earlier in self._versions)),
        }

    # --- the engine's thread ---

    def _generate(self) -> None:
        assert self._engine is not None
        start = time.perf_counter()
        try:
            with self._trace.span(ENGINE, "generate"):
                self._answers = self._engine.generate(self.prompts.prompt_ids, self.sampling, **self._arguments)
        except BaseException as error:  # noqa: BLE001  raised to the trainer, which waits for chunks
            with self._changed:
                self._error = error
                self._changed.notify_all()
        self.seconds = time.perf_counter() - start

    def _note_stall(self) -> None:
        with self._changed:
            self._stalled = True
            self._changed.notify_all()

    def _note(self, prompt: int, sample: int, response: Response) -> None:
        place = prompt * self.n + sample
        if place in self._banked:
            return
        if self._bank is not None:
            self._bank.add(place, response)
        with self._changed:
            self._complete.append((len(self._complete) if self._partial else place, place, response))
            self._changed.notify_all()

    # --- the trainer's thread ---

    def _wait(self, wait_for_all: bool) -> list[tuple[int, int, Response]] | None:
        """Return what completes the next chunks: whole chunks alone, but for the rest at the end. None: the engine waits for its restart."""
        with self._changed:
            wanted = self.num_rows if wait_for_all else self._num_told + self._sizes[0]
            start = time.perf_counter()
            self._changed.wait_for(lambda: len(self._complete) >= wanted or self._error is not None or self._stalled)
            self._trace.add(TRAINER, WAIT_FOR_ENGINE, start, time.perf_counter())
            self._raise_error()
            if len(self._complete) < wanted:
                return None
            fresh = self._complete[self._num_told :]
        fresh = fresh[: sum(self._whole_sizes(len(fresh)))]
        begun = self._begun or []
        made_now = [response for _, place, response in fresh if not begun or response is not begun[place]]
        stale = sorted({response.weight_version for response in made_now} - {self.version})
        if stale:
            raise RunError(f"rollout: answers made by weights {stale}, the actor is at {self.version!r}: sync was lost")
        return fresh

    def _whole_sizes(self, num_responses: int) -> list[int]:
        """Of the next chunks that so many responses complete."""
        ends = list(itertools.accumulate(self._sizes))
        return self._sizes[: sum(end <= num_responses for end in ends)]

    def _take_sizes(self, num_responses: int) -> list[int]:
        taken = self._whole_sizes(num_responses)
        del self._sizes[: len(taken)]
        return taken

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _share(self, fresh: list[tuple[int, int, Response]], count: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Rows [k]; lengths [k], truncated [k], tokens [k, R], log-probs [k, R]; from rank 0 to all ranks."""
        width = self._tokens.shape[1]
        header = torch.zeros(count, 3, dtype=torch.int64)
        tokens = torch.zeros(count, width, dtype=torch.int64)
        log_probs = torch.zeros(count, width, dtype=torch.float32)
        for index, (row, _, response) in enumerate(fresh):
            length = len(response.token_ids)
            cut = response.finish_reason == "length" and not self.sampling.ignore_eos
            header[index] = torch.tensor([row, length, cut])
            tokens[index, :length] = torch.tensor(response.token_ids)
            log_probs[index, :length] = torch.tensor(response.log_probs)
        if dist.get_world_size() > 1:
            for tensor in (header, tokens, log_probs):
                dist.broadcast(tensor, 0)
        return header[:, 0], (header[:, 1], header[:, 2].bool(), tokens, log_probs)

    def _share_origins(self, rows: Tensor, fresh: list[tuple[int, int, Response]]) -> None:
        """Of every row the place of its prompt and the weights that made it, from rank 0 to all ranks."""
        origins = [(place, response.weight_version, list(response.earlier)) for _, place, response in fresh]
        if dist.get_world_size() > 1:
            origins = broadcast_json(origins, 0, dist.group.WORLD)
        for row, (place, version, earlier) in zip(rows.tolist(), origins, strict=True):
            self._place[row] = place
            self._versions[row] = (version, [(label, count) for label, count in earlier])

    def _rollout_of(self, rows: list[int]) -> Rollout:
        rollout = build_rollout(
            self.prompts.select([self._place[row] // self.n for row in rows]),
            self._lengths[rows],
            self._tokens[rows],
            self._log_probs[rows],
            self._truncated[rows],
            self.version,
        )
        if not self._partial:
            return rollout
        versions, earlier = zip(*(self._versions[row] for row in rows), strict=True)
        return replace(rollout, weight_version=list(versions), earlier_versions=list(earlier))


def collect_rollout(
    engine: Generator | None,
    prompts: PromptBatch,
    sampling: SamplingConfig,
    *,
    n: int,
    seed: int,
    version: str,
    trace: TraceRecorder | None = None,
) -> Rollout:
    """The whole of a generation at once. Arguments as for ``Generation``. Collective over the world."""
    size = len(prompts) * n
    generation = Generation(engine, prompts, sampling, n=n, seed=seed, version=version, chunk_size=size, trace=trace)
    generation.start().next_chunks()
    return generation.rollout()

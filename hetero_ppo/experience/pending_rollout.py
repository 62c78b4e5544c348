"""A rollout that is not complete yet. The generator answers in a thread of its own, and every rank gets the complete responses in chunks."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from hetero_ppo.config.derived import chunk_sizes
from hetero_ppo.distributed.text import broadcast_json
from hetero_ppo.errors import RunError
from hetero_ppo.experience.bank import RolloutBank
from hetero_ppo.experience.rollouts import build_rollout
from hetero_ppo.observability.progress import PlainProgress, progress
from hetero_ppo.observability.trace import GENERATOR, TRAINER, WAIT_FOR_GENERATOR, TraceRecorder
from hetero_ppo.rollout.generator import GenerationRequest, Generator
from hetero_ppo.types import Chunk, Response, Rollout

#: In place of a number of responses: the generator waits for its restart.
RESTART = -1
#: Label of the newest weights of a response, and (label, tokens) of those before, oldest first.
Versions = tuple[str, list[tuple[str, int]]]


class PendingRollout:
    """A rollout whose responses are not complete yet. They are cut into chunks in the order of their completion.

    Row p * n + j of the rollout is response j to prompt p. With ``request.num_needed`` the rows are the responses that are complete
    first, in that order; the others are aborted, and are in :meth:`unused`.

    Args:
        generator: Generator that answers.
        request: Prompts, and how to answer them; the same on every rank but for the partial responses, which the generator's rank has.
        world: Group of all ranks.
        generator_rank: Rank that has the generator, and broadcasts its responses. A collective generator is on every rank.
        version: Label of the weights that the generator has.
        chunk_size: Responses of a chunk; the last chunks have fewer (``derived.chunk_sizes``).
        bank: Bank on the generator's rank, with the step's file open; it gets every response that completes. None: nothing is banked.
        banked: Pairs of place (p * n + j) and response that the bank had. They are complete before the others, in this order, and are
            not asked for again.
        restart: Function that gives the devices to the generator and restarts its dead servers; collective over the world. It is called
            when no server is left that could answer. None: that cannot happen.
        trace: Trace that records the generator's time.
    """

    def __init__(
        self,
        generator: Generator,
        request: GenerationRequest,
        world: dist.ProcessGroup,
        *,
        generator_rank: int,
        version: str,
        chunk_size: int,
        bank: RolloutBank | None = None,
        banked: Sequence[tuple[int, Response]] = (),
        restart: Callable[[], None] | None = None,
        trace: TraceRecorder | None = None,
    ) -> None:
        self.request = request.with_complete(banked)
        self.version = version
        self.num_rows = request.num_rows
        self.seconds = 0.0  # time that the generator took, on its rank
        self._restart = restart
        self._stalled = False  # the generator waits for its restart
        self._bank = bank
        self._banked = {place for place, _ in banked}
        self._keeps_order = request.num_needed is None  # otherwise the rows are in the order of completion
        self._generator = generator
        self._world = world
        self._generator_rank = generator_rank
        self._trace = trace or TraceRecorder()
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._complete: list[tuple[int, int, Response]] = []  # (row, place, response) in the order of completion
        self._answers: list[list[Response]] = []  # what the generator returned
        self._error: BaseException | None = None
        for place, response in banked:
            self._complete.append((place if self._keeps_order else len(self._complete), place, response))
        # From here on: what every rank knows; tensors and lists have an entry for each row.
        self._num_shared = 0
        self._sizes = chunk_sizes(self.num_rows, chunk_size)  # sizes of the chunks that have not been handed out
        self._num_chunks = 0
        width = max(request.limit_of(prompt) for prompt in range(len(request.prompts)))
        self._lengths = torch.zeros(self.num_rows, dtype=torch.int64)
        self._truncated = torch.zeros(self.num_rows, dtype=torch.bool)
        self._tokens = torch.zeros(self.num_rows, width, dtype=torch.int64)
        self._log_probs = torch.zeros(self.num_rows, width, dtype=torch.float32)
        self._chunk_of = [0] * self.num_rows
        self._place = list(range(self.num_rows))  # p * n + j, for a row's prompt p and sample j
        self._versions: list[Versions] = [(version, [])] * self.num_rows

    def start(self) -> PendingRollout:
        """Let the generator start; a collective one has answered everything when this returns."""
        if self._generator.capabilities.is_collective:
            self._generate()
        elif self._generator.is_here:
            self._thread = threading.Thread(target=self._generate, name="generation", daemon=True)
            self._thread.start()
        return self

    @property
    def finished(self) -> bool:
        """True when every response has been handed out in a chunk; the same on every rank."""
        return self._num_shared == self.num_rows

    @property
    def max_columns(self) -> int:
        """Largest possible T: predicted tokens of the longest prompt with the longest response that is allowed."""
        return max(len(ids) for ids in self.request.prompts.prompt_ids) + self._tokens.shape[1] - 1

    def next_chunks(self, *, wait_for_all: bool = False) -> list[Chunk]:
        """Return the chunks that are complete and were not handed out yet, at least one. Collective over the world; blocks.

        Args:
            wait_for_all: Whether to wait until the generator has answered everything.

        Raises:
            RunError: Other weights than ``version`` made an answer. Errors of the generator are raised too.
        """
        assert not self.finished, "all chunks have been handed out"
        while True:
            fresh = self._wait(wait_for_all) if self._generator.is_here else []
            count = torch.tensor([RESTART if fresh is None else len(fresh)])
            if self._world.size() > 1:
                dist.broadcast(count, self._generator_rank, group=self._world)
            if int(count) != RESTART:
                break
            self._stalled = False
            assert self._restart is not None  # otherwise the generator would not report that it waits
            self._restart()
        assert fresh is not None
        rows, part = self._share(fresh, int(count))
        for own, values in zip((self._lengths, self._truncated, self._tokens, self._log_probs), part, strict=True):
            own[rows] = values
        if not self._keeps_order:
            self._share_origins(rows, fresh)
        self._num_shared += int(count)
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
        """Return all rows, in the order of the prompts."""
        assert self.finished, "responses are missing"
        return replace(self._rollout_of(list(range(self.num_rows))), chunk_index=list(self._chunk_of))

    def unused(self) -> tuple[set[int], dict[int, Response]]:
        """Return the places whose responses are in the rollout, and place -> response of the others, on the generator's rank alone."""
        assert self.finished and self.request.n == 1, "only single responses can be partial"
        used = set(self._place)
        rest = {place: group[0] for place, group in enumerate(self._answers) if place not in used}
        return used, rest

    def metrics(self) -> dict[str, float]:
        """Return how old the weights of resumed responses are, and which share of the rows came from the bank."""
        banked = {"rollout/banked_share": len(self._banked) / self.num_rows} if self._banked else {}
        if self._keeps_order:
            return banked
        older = torch.tensor([sum(count for _, count in earlier) for _, earlier in self._versions])
        older = torch.where(torch.tensor([v != self.version for v, _ in self._versions]), self._lengths, older)
        return banked | {
            "rollout/resumed_share": float((older > 0).float().mean()),
            "rollout/stale_token_share": float(older.sum() / self._lengths.sum()),
            "rollout/weight_versions_max": float(max(1 + len(earlier) for _, earlier in self._versions)),
        }

    # --- the generator's thread ---

    def _generate(self) -> None:
        start = time.perf_counter()
        try:
            on_stalled = None if self._restart is None else self._note_stall
            bar: tqdm | PlainProgress[None] = progress(
                description="rollout", total=self.num_rows, unit="response", leave=False
            )
            with self._trace.span(GENERATOR, "generate"), bar:
                bar.update(len(self._banked))

                def note(prompt: int, sample: int, response: Response) -> None:
                    if self._note(prompt, sample, response):
                        bar.update(1)

                self._answers = self._generator.generate(self.request, on_response=note, on_stalled=on_stalled)
        except BaseException as error:  # noqa: BLE001  raised to the trainer, which waits for chunks
            with self._changed:
                self._error = error
                self._changed.notify_all()
        self.seconds = time.perf_counter() - start

    def _note_stall(self) -> None:
        with self._changed:
            self._stalled = True
            self._changed.notify_all()

    def _note(self, prompt: int, sample: int, response: Response) -> bool:
        """Take a complete response. Return False if it was there already."""
        place = prompt * self.request.n + sample
        if place in self._banked:
            return False
        if self._bank is not None:
            self._bank.add(place, response)
        with self._changed:
            self._complete.append((place if self._keeps_order else len(self._complete), place, response))
            self._changed.notify_all()
        return True

    # --- the trainer's thread ---

    def _wait(self, wait_for_all: bool) -> list[tuple[int, int, Response]] | None:
        """Return (row, place, response) of the next whole chunks that are complete. None: the generator waits for its restart."""
        with self._changed:
            num_needed = self.num_rows if wait_for_all else self._num_shared + self._sizes[0]
            start = time.perf_counter()
            self._changed.wait_for(
                lambda: len(self._complete) >= num_needed or self._error is not None or self._stalled
            )
            self._trace.add(TRAINER, WAIT_FOR_GENERATOR, start, time.perf_counter())
            self._raise_error()
            if len(self._complete) < num_needed:
                return None
            fresh = self._complete[self._num_shared :]
        fresh = fresh[: sum(self._whole_sizes(len(fresh)))]
        partial = self.request.partial or []
        made_now = [response for _, place, response in fresh if not partial or response is not partial[place]]
        stale = sorted({response.weight_version for response in made_now} - {self.version})
        if stale:
            raise RunError(f"rollout: answers made by weights {stale}, the actor is at {self.version!r}: sync was lost")
        return fresh

    def _whole_sizes(self, num_responses: int) -> list[int]:
        """Return the sizes of the next chunks that this number of responses completes."""
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
        """Return rows [k], and lengths [k], truncated [k], tokens [k, R] and log-probs [k, R]. The generator's rank broadcasts them."""
        width = self._tokens.shape[1]
        header = torch.zeros(count, 3, dtype=torch.int64)
        tokens = torch.zeros(count, width, dtype=torch.int64)
        log_probs = torch.zeros(count, width, dtype=torch.float32)
        for index, (row, _, response) in enumerate(fresh):
            length = len(response.token_ids)
            cut = response.finish_reason == "length" and not self.request.sampling.ignore_eos
            header[index] = torch.tensor([row, length, cut])
            tokens[index, :length] = torch.tensor(response.token_ids)
            log_probs[index, :length] = torch.tensor(response.log_probs)
        if self._world.size() > 1:
            for tensor in (header, tokens, log_probs):
                dist.broadcast(tensor, self._generator_rank, group=self._world)
        return header[:, 0], (header[:, 1], header[:, 2].bool(), tokens, log_probs)

    def _share_origins(self, rows: Tensor, fresh: list[tuple[int, int, Response]]) -> None:
        """Broadcast the place of every row, and the weights that made it, from the generator's rank."""
        origins = [(place, response.weight_version, list(response.earlier)) for _, place, response in fresh]
        if self._world.size() > 1:
            origins = broadcast_json(origins, self._generator_rank, self._world)
        for row, (place, version, earlier) in zip(rows.tolist(), origins, strict=True):
            self._place[row] = place
            self._versions[row] = (version, [(label, count) for label, count in earlier])

    def _rollout_of(self, rows: list[int]) -> Rollout:
        rollout = build_rollout(
            self.request.prompts.select([self._place[row] // self.request.n for row in rows]),
            self._lengths[rows],
            self._tokens[rows],
            self._log_probs[rows],
            self._truncated[rows],
            self.version,
        )
        if self._keeps_order:
            return rollout
        versions, earlier = zip(*(self._versions[row] for row in rows), strict=True)
        return replace(rollout, weight_version=list(versions), earlier_versions=list(earlier))


def collect_rollout(
    generator: Generator,
    request: GenerationRequest,
    world: dist.ProcessGroup,
    *,
    generator_rank: int,
    version: str,
    trace: TraceRecorder | None = None,
) -> Rollout:
    """Generate and return a whole rollout at once. Collective over the world.

    Args:
        generator: Generator that answers.
        request: Prompts, and how to answer them.
        world: Group of all ranks.
        generator_rank: Rank that has the generator, and broadcasts its responses. A collective generator is on every rank.
        version: Label of the weights that the generator has.
        trace: Trace that records the generator's time.
    """
    pending = PendingRollout(
        generator,
        request,
        world,
        generator_rank=generator_rank,
        version=version,
        chunk_size=request.num_rows,
        trace=trace,
    )
    pending.start().next_chunks()
    return pending.rollout()

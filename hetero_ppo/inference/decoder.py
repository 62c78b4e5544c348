"""Generation with a role's own parameters: a key-value cache of slots, batched continuously.

A forward takes one token of every sequence that is decoded and the whole prompts of the requests that have just found a slot, so
that a finished sequence's place is taken by the next step (Yu et al. 2022, "Orca", iteration-level scheduling).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from hetero_ppo.algorithms.sampling import sample_tokens
from hetero_ppo.config.schema import SamplingConfig
from hetero_ppo.engines.model_engine import ModelEngine
from megatron_bridge import platform
from megatron_bridge.model.cached_attention import SlotCache, Stretch

#: Prompt tokens of one forward; a single longer prompt goes alone.
PREFILL_TOKENS = 4096
#: float32 products of fewer rows take another kernel on a CPU, which rounds otherwise.
MIN_ROWS = 4


@dataclass(frozen=True)
class Request:
    """One request for a response."""

    prompt: list[int]
    max_tokens: int
    seed: int  # seed of the response's random numbers, one for each token


@dataclass(frozen=True)
class Completion:
    """A complete response."""

    token_ids: list[int]
    log_probs: list[float]
    stopped: bool  # its last token ended it; False: it has max_tokens
    step: int  # number of the forward on this rank that completed it


@dataclass
class _Sequence:
    """A request that has a slot."""

    index: int  # place of the request among all requests
    request: Request
    uniforms: list[float]  # one for each token that may come
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    done: bool = False

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values are stored: all but the newest."""
        return len(self.request.prompt) + len(self.token_ids) - 1


class Decoder:
    """Answers requests with the parameters of a role, on one data-parallel rank of it.

    A response has random numbers of its own, so they do not depend on the rest of the batch. The rounding of its logits does depend on
    the size of the batch. That changes a token only if a random number falls between two roundings of a probability.
    """

    def __init__(self, engine: ModelEngine, num_slots: int, max_length: int) -> None:
        """Args:
        engine: Model of a role whose layout has tensor and data parallelism only.
        num_slots: Number of sequences that are decoded at the same time.
        max_length: Largest number of tokens of prompt and response.
        """
        layout = engine.config.parallel
        assert layout.pipeline == layout.context == layout.expert == 1, "check_megatron_engine"
        self.engine = engine
        self.num_slots = num_slots
        self.max_length = max_length
        self._cache: SlotCache | None = None

    @property
    def has_cache(self) -> bool:
        return self._cache is not None

    def allocate(self) -> None:
        """Allocate the cache, unless it is allocated."""
        if self._cache is None:
            self._cache = SlotCache(self.engine.bridge.transformer, self.num_slots, self.max_length)

    def free(self) -> None:
        """Free the cache."""
        self._cache = None

    @torch.no_grad()
    def run(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        is_last: Callable[[list[int]], bool],
        on_complete: Callable[[int, Completion], None],
    ) -> None:
        """Answer all requests, in the role's turn. Collective over its tensor-parallel ranks.

        Args:
            requests: Requests in the order in which they get a slot.
            sampling: Temperature, top_p and top_k of the sampling.
            is_last: Function of a response's tokens so far that returns whether the last of them ends it.
            on_complete: Function that is called with the index and the completion of every request.

        Raises:
            FloatingPointError: A logit is NaN or infinite.
        """
        (model,) = self.engine.evaluating("generation")
        waiting = deque(enumerate(requests))
        live: list[_Sequence] = []  # live[i] has slot i
        step = 0
        while waiting or live:
            admitted = self._admit(waiting, self.num_slots - len(live))
            logits = self._step(model, live, admitted)
            live += admitted
            tokens, log_probs = self._sample(logits, live, sampling)
            step += 1
            for sequence, token, log_prob in zip(live, tokens, log_probs, strict=True):
                sequence.token_ids.append(token)
                sequence.log_probs.append(log_prob)
                stopped = is_last(sequence.token_ids)
                sequence.done = stopped or len(sequence.token_ids) == sequence.request.max_tokens
                if sequence.done:
                    completion = Completion(sequence.token_ids, sequence.log_probs, stopped, step)
                    on_complete(sequence.index, completion)
            self._retire(live)

    @torch.no_grad()
    def log_probs(self, token_ids: list[int]) -> list[float]:
        """Return log p(token t + 1 | tokens 0..t) at temperature 1, for t = 0 .. len - 2, in the role's turn.

        The first half is computed like a prompt, the rest like a response: token by token through the cache. Collective over the
        tensor-parallel ranks.
        """
        (model,) = self.engine.evaluating("generation")
        num_inputs = len(token_ids) - 1
        first = max(1, num_inputs // 2)
        stretch = Stretch(slot=0, start=0, length=first)
        logits = [self._forward(model, token_ids[:first], [], [stretch], range(first))]
        logits += [self._forward(model, [token_ids[t]], [t], [], [0]) for t in range(first, num_inputs)]
        targets = torch.tensor(token_ids[1:], device=logits[0].device)[:, None]
        return torch.log_softmax(torch.cat(logits).float(), dim=-1).gather(1, targets)[:, 0].tolist()

    def _admit(self, waiting: deque[tuple[int, Request]], num_free: int) -> list[_Sequence]:
        """Take the next requests: as many as have a free slot and fit into one forward."""
        admitted: list[_Sequence] = []
        num_tokens = 0
        while waiting and len(admitted) < num_free:
            index, request = waiting[0]
            num_tokens += len(request.prompt)
            if admitted and num_tokens > PREFILL_TOKENS:
                break
            waiting.popleft()
            generator = torch.Generator().manual_seed(request.seed)
            uniforms = torch.rand(request.max_tokens, dtype=torch.float64, generator=generator)
            admitted.append(_Sequence(index, request, uniforms.tolist()))
        return admitted

    def _step(self, model: GPTModel, live: Sequence[_Sequence], admitted: Sequence[_Sequence]) -> Tensor:
        """Return [live and admitted, V] logits of the next token of every sequence."""
        tokens = [sequence.token_ids[-1] for sequence in live]
        positions = [sequence.num_cached for sequence in live]
        rows = list(range(len(live)))
        stretches = []
        for slot, sequence in enumerate(admitted, len(live)):
            tokens += sequence.request.prompt
            stretches.append(Stretch(slot, 0, len(sequence.request.prompt)))
            rows.append(len(tokens) - 1)
        return self._forward(model, tokens, positions, stretches, rows)

    def _forward(
        self,
        model: GPTModel,
        tokens: list[int],
        positions: Sequence[int],
        stretches: Sequence[Stretch],
        rows: Sequence[int],
    ) -> Tensor:
        """Return [rows, V] logits, the same bits on every tensor-parallel rank."""
        assert self._cache is not None
        num_tokens = self._padded(len(tokens))
        head_rows = [*rows, *[0] * (self._padded(len(rows)) - len(rows))]
        self._cache.take(positions, stretches, num_tokens, head_rows)
        padded = [*tokens, *[0] * (num_tokens - len(tokens))]
        ids = torch.tensor([padded], device=platform.device())
        # Rotary embeddings take positions from the cache; the model takes an argument for learned ones.
        logits = model(ids, torch.zeros_like(ids), None, inference_context=self._cache, runtime_gather_output=True)
        return logits[0, : len(rows), : self.engine.vocab_size]

    def _padded(self, num_rows: int) -> int:
        """Return the number of rows of a product, padded like micro-batches and to ``MIN_ROWS`` at least."""
        return self.engine.forward_size.padded(max(num_rows, MIN_ROWS))

    def _sample(
        self, logits: Tensor, live: Sequence[_Sequence], sampling: SamplingConfig
    ) -> tuple[list[int], list[float]]:
        """Sample the next token of every sequence, with its log-prob. All tensor-parallel ranks take the tokens of the first one.

        Raises:
            FloatingPointError: A logit is NaN or infinite.
        """
        if not torch.isfinite(logits.sum()):
            raise FloatingPointError(
                f"generation: {self.engine.role}'s logits are not finite; look at the weights that it was loaded with, and at "
                "the gradient norms of the steps before"
            )
        uniforms = [sequence.uniforms[len(sequence.token_ids)] for sequence in live]
        tokens, log_probs = sample_tokens(
            logits,
            torch.tensor(uniforms, dtype=torch.float64, device=logits.device),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
        )
        tp_group = self.engine.groups.tp
        if tp_group.size() > 1:
            dist.broadcast(tokens, dist.get_process_group_ranks(tp_group)[0], group=tp_group)
        return tokens.tolist(), log_probs.tolist()

    def _retire(self, live: list[_Sequence]) -> None:
        """Remove complete sequences. The last ones move into the slots that become free, so that the used slots stay contiguous."""
        assert self._cache is not None
        slot = 0
        while slot < len(live):
            if not live[slot].done:
                slot += 1
                continue
            last = live.pop()
            if slot < len(live):
                live[slot] = last
                if not last.done:
                    self._cache.move(len(live), slot, last.num_cached)

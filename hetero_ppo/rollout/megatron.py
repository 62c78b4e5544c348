"""The rollout engine without a server: the actor itself generates, on every rank of its layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from hetero_ppo.config.devices import dtype_of
from hetero_ppo.config.schema import RolloutConfig, SamplingConfig
from hetero_ppo.engines.model_engine import ModelEngine
from hetero_ppo.inference.decoder import Completion, Decoder, Request
from hetero_ppo.observability.progress import progress
from hetero_ppo.rollout.engine_checks import golden_difference, response_limits
from hetero_ppo.rollout.requests import response_seed
from hetero_ppo.rollout.servers.server import sleeps
from hetero_ppo.rollout.weights.weight_sync import SyncStats
from hetero_ppo.types import OnResponse, Response
from megatron_bridge import platform

#: Of the actor's turns while it generates.
PHASE = "rollout"


class MegatronEngine:
    """Generation with the actor's own parameters. Same interface as ``VllmEngine``, but it lives on every rank.

    ``generate``, ``prompt_log_probs`` and ``verify_sync`` are collective over the actor's ranks: the data-parallel ones share the
    responses, the tensor-parallel ones compute each together. They open the actor's turn themselves. There is no second copy of
    the weights and nothing to synchronise.

    Args:
        config: the ``rollout`` section; ``max_num_seqs`` responses are decoded at the same time on a data-parallel rank.
        actor: its layout is tensor and data parallelism alone.
        max_model_len: tokens, longest prompt and response together.
        eos_token_ids: they end a response, unless ``sampling.ignore_eos``.
        initial_version: label of the actor's weights.
        decode: text of tokens, special ones left out, for stop strings; None: ``sampling.stop`` is refused.
    """

    def __init__(
        self,
        config: RolloutConfig,
        actor: ModelEngine,
        *,
        max_model_len: int,
        eos_token_ids: list[int],
        initial_version: str = "initial",
        decode: Callable[[list[int]], str] | None = None,
    ):
        self.config = config
        self.is_collective = True
        self.actor = actor
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.version: str | None = initial_version
        self.last_sync: SyncStats | None = None  # none ever takes place
        self._decode = decode
        self._decoder = Decoder(actor, config.max_num_seqs, max_model_len)
        self._sleeps = sleeps(config, cuda=platform.HAS_CUDA)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Take the memory of the key-value cache."""
        self.wake()

    def close(self) -> None:
        """Give it back. May be called more than once."""
        self._decoder.free()

    def sleep(self) -> None:
        """Give the cache's memory back. The parameters are the actor's, and leave with its turn."""
        if self._sleeps:
            self._decoder.free()

    def wake(self, *, weights_only: bool = False) -> None:
        """Take the cache's memory again, unless ``weights_only``."""
        if not weights_only:
            self._decoder.allocate()

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        *,
        n: int,
        seed: int,
        max_tokens: list[int] | None = None,
        on_response: OnResponse | None = None,
        show_progress: bool = False,
    ) -> list[list[Response]]:
        """Answers prompts. Collective over the actor's ranks; every rank gives the same and gets all.

        Args:
            prompts: token ids, not padded.
            sampling: how to sample.
            n: responses per prompt.
            seed: of this call; the same call with the same seed and weights gives the same tokens.
            max_tokens: response tokens of each prompt; None: ``sampling.max_tokens`` for all.
            on_response: told of every response, in the order of completion and the same on every rank: as soon as it is complete
                with one data-parallel rank, when all are with several.
            show_progress: a progress bar on stderr, of this rank's responses.

        Returns:
            For each prompt, in order, its n responses.

        Raises:
            ValueError: a prompt is empty or too long, or there are stop strings and no tokenizer.
        """
        limits = response_limits(prompts, sampling, max_tokens, self.max_model_len)
        if sampling.stop and self._decode is None:
            raise ValueError(f"generate: sampling.stop={sampling.stop} needs a tokenizer; give the engine decode")
        self._require_cache("generate")
        dp_group = self.actor.groups.dp
        num_rows = len(prompts) * n
        mine = range(dp_group.rank(), num_rows, dp_group.size())
        requests = [
            Request(prompts[row // n], limits[row // n], response_seed(seed, row // n, row % n)) for row in mine
        ]
        responses: dict[int, Response] = {}
        own: dict[int, Completion] = {}

        def tell(row: int, completion: Completion) -> None:
            responses[row] = self._response(completion)
            if on_response is not None:
                on_response(*divmod(row, n), responses[row])

        with (
            self.actor.on_device(phase=PHASE),
            progress(description="rollout", total=len(mine), is_writer=show_progress, unit="response") as bar,
        ):

            def complete(index: int, completion: Completion) -> None:
                bar.update(1)
                own[mine[index]] = completion
                if dp_group.size() == 1:
                    tell(mine[index], completion)

            self._decoder.run(requests, sampling, self._end_of(sampling), complete)
        if dp_group.size() > 1:
            shared = _share(own, num_rows, max(limits), dp_group)
            for row in sorted(shared, key=lambda row: (shared[row].step, row)):
                tell(row, shared[row])
        return [[responses[i * n + j] for j in range(n)] for i in range(len(prompts))]

    def _end_of(self, sampling: SamplingConfig) -> Callable[[list[int]], bool]:
        """Whether the last of a response's tokens ends it."""
        stops = {*sampling.stop_token_ids, *([] if sampling.ignore_eos else self.eos_token_ids)}

        def is_last(token_ids: list[int]) -> bool:
            if token_ids[-1] in stops or not sampling.stop:
                return token_ids[-1] in stops
            assert self._decode is not None
            text = self._decode(token_ids)
            return any(stop in text for stop in sampling.stop)

        return is_last

    def _response(self, completion: Completion) -> Response:
        assert self.version is not None
        reason = "stop" if completion.stopped else "length"
        return Response(completion.token_ids, completion.log_probs, reason, self.version)

    def _require_cache(self, what: str) -> None:
        if not self._decoder.has_cache:
            raise RuntimeError(f"{what}: the rollout engine is asleep; wake it before")

    def sync_weights(self, tensors: Iterator[tuple[str, Tensor]], version: str) -> None:
        """The actor has its newest parameters itself: their label alone is taken.

        The stream is left alone, on every rank alike: its first tensor is what would begin a collective.
        """
        self.version = version

    def prompt_log_probs(self, token_ids: list[int]) -> list[float]:
        """log p(token t + 1 | tokens 0..t) at temperature 1, for t = 0 .. len - 2, through the cache."""
        self._require_cache("prompt log-probs")
        with self.actor.on_device(phase=PHASE):
            return self._decoder.log_probs(token_ids)

    def verify_sync(self, token_ids: list[int], log_probs: list[float]) -> float:
        """Compares log-probs of a golden prompt by way of the cache with those of a forward without it.

        Args:
            token_ids: the golden prompt, L tokens.
            log_probs: L - 1 values, log p(token t + 1 | tokens 0..t) at temperature 1.

        Returns:
            The largest absolute difference.

        Raises:
            RuntimeError: it is larger than ``verify_sync_tolerance``: the engine does not compute what the trainer does.
        """
        what = f"weight sync {self.version!r}: the megatron engine"
        meaning = "the key-value cache does not give what a whole forward does"
        dtype = dtype_of(self.actor.config.model)
        return golden_difference(self.prompt_log_probs(token_ids), log_probs, self.config, dtype, what, meaning)


def _share(
    own: dict[int, Completion], num_rows: int, max_tokens: int, dp_group: dist.ProcessGroup
) -> dict[int, Completion]:
    """All rows' completions, of which each data-parallel rank has its own. Collective over ``dp_group``."""
    header = torch.zeros(num_rows, 3, dtype=torch.int64)
    tokens = torch.zeros(num_rows, max_tokens, dtype=torch.int64)
    log_probs = torch.zeros(num_rows, max_tokens, dtype=torch.float32)
    for row, completion in own.items():
        length = len(completion.token_ids)
        header[row] = torch.tensor([length, completion.stopped, completion.step])
        tokens[row, :length] = torch.tensor(completion.token_ids)
        log_probs[row, :length] = torch.tensor(completion.log_probs)
    for tensor in (header, tokens, log_probs):  # each row is zeros on all ranks but one
        dist.all_reduce(tensor, group=dp_group)
    return {
        row: Completion(tokens[row, :length].tolist(), log_probs[row, :length].tolist(), bool(stopped), step)
        for row, (length, stopped, step) in enumerate(header.tolist())
    }

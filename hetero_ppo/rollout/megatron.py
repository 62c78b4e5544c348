"""The generator without a server: the actor answers prompts itself, on every rank of its layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from hetero_ppo.config.devices import dtype_of
from hetero_ppo.config.schema import RolloutConfig, SamplingConfig
from hetero_ppo.engines.model_engine import ModelEngine
from hetero_ppo.inference.decoder import Completion, Decoder, Request
from hetero_ppo.rollout.checks import check_request, probe_difference
from hetero_ppo.rollout.generator import Capabilities, GenerationRequest, Generator
from hetero_ppo.rollout.requests import response_seed
from hetero_ppo.rollout.servers.server import sleeps
from hetero_ppo.rollout.weights.targets import POLICY, check_target
from hetero_ppo.types import OnResponse, Response
from megatron_bridge import platform

#: Name of the actor's turns while it generates.
PHASE = "rollout"


class MegatronGenerator(Generator):
    """Answers with the actor's own parameters, on every rank of its layout.

    ``generate``, ``prompt_log_probs`` and ``verify_sync`` are collective over the actor's ranks. Data-parallel ranks share the
    responses, and tensor-parallel ranks compute each one together. The methods open the actor's turn themselves. There is no second
    copy of the weights, so there is nothing to synchronise.

    Args:
        config: The ``rollout`` section. A data-parallel rank decodes ``max_num_seqs`` responses at once.
        actor: Actor whose layout has tensor and data parallelism only.
        max_model_len: Largest number of tokens, prompt and response together.
        eos_token_ids: Token ids that end a response, unless ``sampling.ignore_eos``.
        initial_version: Label of the actor's weights.
        decode: Function from token ids to their text without special tokens, for stop strings. None: ``sampling.stop`` is refused.
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
        self.capabilities = Capabilities(is_collective=True, can_sleep=sleeps(config, cuda=platform.HAS_CUDA))
        self.actor = actor
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.version: str | None = initial_version
        self._decode = decode
        self._decoder = Decoder(actor, config.max_num_seqs, max_model_len)

    def start(self) -> None:
        """Take the memory of the key-value cache."""
        self.wake()

    def close(self) -> None:
        """Give the memory of the key-value cache back. May be called more than once."""
        self._decoder.free()

    def sleep(self) -> None:
        """Give the cache's memory back. The parameters are the actor's, and leave with its turn."""
        if self.capabilities.can_sleep:
            self._decoder.free()

    def wake(self, *, weights_only: bool = False) -> None:
        """Take the cache's memory again, unless ``weights_only``."""
        if not weights_only:
            self._decoder.allocate()

    def generate(
        self,
        request: GenerationRequest,
        *,
        on_response: OnResponse | None = None,
        on_stalled: Callable[[], None] | None = None,
    ) -> list[list[Response]]:
        """Answer prompts, see ``Generator.generate``. Collective over the actor's ranks: every rank gives the same request and gets all responses.

        With several data-parallel ranks ``on_response`` is called when all responses are complete. It is called in the same order on
        every rank.

        Raises:
            ValueError: A prompt is empty or too long, or there are stop strings and no tokenizer.
        """
        check_request(request, self.capabilities, self.max_model_len)
        sampling, n = request.sampling, request.n
        if sampling.stop and self._decode is None:
            raise ValueError(f"generate: sampling.stop={sampling.stop} needs a tokenizer; give the generator decode")
        self._require_cache("generate")
        dp_group = self.actor.groups.dp
        mine = range(dp_group.rank(), request.num_places, dp_group.size())
        requests = [
            Request(
                request.prompts.prompt_ids[row // n],
                request.limit_of(row // n),
                response_seed(request.seed, row // n, row % n),
            )
            for row in mine
        ]
        responses: dict[int, Response] = {}
        own: dict[int, Completion] = {}

        def notify(row: int, completion: Completion) -> None:
            responses[row] = self._response(completion)
            if on_response is not None:
                on_response(*divmod(row, n), responses[row])

        def complete(index: int, completion: Completion) -> None:
            own[mine[index]] = completion
            if dp_group.size() == 1:
                notify(mine[index], completion)

        with self.actor.on_device(phase=PHASE):
            self._decoder.run(requests, sampling, self._end_of(sampling), complete)
        num_prompts = len(request.prompts)
        if dp_group.size() > 1:
            longest = max(request.limit_of(prompt) for prompt in range(num_prompts))
            shared = _share(own, request.num_places, longest, dp_group)
            for row in sorted(shared, key=lambda row: (shared[row].step, row)):
                notify(row, shared[row])
        return [[responses[i * n + j] for j in range(n)] for i in range(num_prompts)]

    def _end_of(self, sampling: SamplingConfig) -> Callable[[list[int]], bool]:
        """Return a function that returns whether the last of a response's tokens ends it."""
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
            raise RuntimeError(f"{what}: the generator is asleep; wake it before")

    def sync_weights(self, tensors: Iterator[tuple[str, Tensor]], version: str, *, target: str = POLICY) -> None:
        """Take the label of the actor's newest parameters. The tensors are not read, on any rank."""
        check_target(target)
        self.version = version

    def prompt_log_probs(self, token_ids: list[int]) -> list[float]:
        """Return [L - 1] log p(token t + 1 | tokens 0..t) at temperature 1, through the cache, for a prompt of L tokens."""
        self._require_cache("prompt log-probs")
        with self.actor.on_device(phase=PHASE):
            return self._decoder.log_probs(token_ids)

    def verify_sync(self, token_ids: list[int], log_probs: list[float]) -> float:
        """Compare log-probs through the key-value cache with those of a forward without it, see ``Generator.verify_sync``."""
        what = f"weight sync {self.version!r}: the megatron generator"
        meaning = "the key-value cache does not give what a whole forward does"
        dtype = dtype_of(self.actor.config.model)
        return probe_difference(self.prompt_log_probs(token_ids), log_probs, self.config, dtype, what, meaning)


def _share(
    own: dict[int, Completion], num_rows: int, max_tokens: int, dp_group: dist.ProcessGroup
) -> dict[int, Completion]:
    """Return all rows' completions, of which each data-parallel rank has its own. Collective over ``dp_group``."""
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

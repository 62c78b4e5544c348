"""The interface of generators, which answer prompts, and the capabilities of each.

``vllm.py`` (servers), ``megatron.py`` (the actor's own decoder) and ``replay.py`` (recorded rollouts) implement it. A rank without a
generator has a :class:`NullGenerator`, so every rank makes the same calls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from torch import Tensor

from hetero_ppo.config.schema import SamplingConfig
from hetero_ppo.rollout.weights.targets import POLICY, check_target
from hetero_ppo.types import OnResponse, PromptBatch, Response


@dataclass(frozen=True)
class Capabilities:
    """Abilities and needs of a generator. All ranks of a run have the same capabilities, also those with a ``NullGenerator``."""

    is_collective: bool = False  # it is on every rank, and all ranks call it together; False: only rank 0 has it
    is_recorded: bool = False  # it repeats recorded responses: it answers no other prompts and scores no given tokens
    can_resume: bool = False  # it continues partial responses, and aborts the others when enough are complete
    can_sleep: bool = False  # it gives device memory back in ``sleep`` and takes it in ``wake``
    has_servers: bool = False  # its processes may die, and ``restart_down`` starts them again
    needs_weight_sync: bool = False  # it answers with a copy of the actor's weights, which ``sync_weights`` replaces


@dataclass(frozen=True)
class GenerationRequest:
    """A request for n responses to each of P prompts. Response j to prompt p has place p * n + j."""

    prompts: PromptBatch  # P prompts; the same on every rank
    sampling: SamplingConfig
    n: int
    seed: int  # the same request with the same weights gives the same tokens
    max_tokens: list[int] | None = None  # response tokens of each prompt, [P]; None: ``sampling.max_tokens`` for all
    #: [P * n] partial responses of earlier requests, each None where there is none. A partial response keeps its tokens, log-probs
    #: and weight versions, and is continued with the present weights. None: every response is new.
    partial: list[Response | None] | None = None
    num_needed: int | None = (
        None  # number of complete responses after which the others are aborted; None: no one is aborted
    )

    @property
    def num_places(self) -> int:
        """Number of responses that are requested."""
        return len(self.prompts) * self.n

    @property
    def num_rows(self) -> int:
        """Number of responses that must be complete."""
        return self.num_places if self.num_needed is None else self.num_needed

    def limit_of(self, prompt: int) -> int:
        """Return the largest number of response tokens of a prompt."""
        return self.sampling.max_tokens if self.max_tokens is None else self.max_tokens[prompt]

    def with_complete(self, responses: Sequence[tuple[int, Response]]) -> GenerationRequest:
        """Return the request with these responses as ones that are complete already.

        Args:
            responses: Pairs of a place and its response.
        """
        if not responses:
            return self
        partial: list[Response | None] = [None] * self.num_places if self.partial is None else list(self.partial)
        for place, response in responses:
            partial[place] = response
        return replace(self, partial=partial)


class Generator(ABC):
    """Answers prompts. A context manager: entering it starts the generator, leaving it ends it.

    The methods that belong to a capability do nothing by default, for generators without it.
    """

    #: Capabilities, the same on every rank.
    capabilities: Capabilities
    #: Whether this rank has the generator. False: this rank gets the responses from the generator's rank.
    is_here = True

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the generator. It is awake when this returns."""

    def close(self) -> None:
        """End the generator. May be called more than once."""

    @abstractmethod
    def generate(
        self,
        request: GenerationRequest,
        *,
        on_response: OnResponse | None = None,
        on_stalled: Callable[[], None] | None = None,
    ) -> list[list[Response]]:
        """Answer prompts. Blocks; collective where the generator is.

        Args:
            request: Prompts, and how to answer them.
            on_response: Function that is called with (prompt, sample, response) for every complete response, in the order of
                completion, at most ``num_needed`` times.
            on_stalled: Function that is called repeatedly while all servers are down and prompts wait for ``restart_down``. None: that
                is an error.

        Returns:
            For each prompt, in order, its n responses. With ``num_needed`` the aborted ones end with ``abort``, and more may be complete
            than ``on_response`` was called for. Both go into the next request's ``partial``.

        Raises:
            ValueError: The request does not fit the generator.
            RuntimeError: The generator failed, and has ended.
        """

    @abstractmethod
    def sync_weights(self, tensors: Iterator[tuple[str, Tensor]], version: str, *, target: str = POLICY) -> None:
        """Answer with new weights from now on.

        Args:
            tensors: Pairs of Hugging Face name and full tensor of the whole model. Making them is collective over the actor's ranks, so
                they are read on every rank where ``needs_weight_sync``, and on none otherwise.
            version: Label of the weights.
            target: Model that the weights are for, see ``weights/targets.py``.

        Raises:
            ValueError: There is no such target.
        """

    def verify_sync(self, token_ids: list[int], log_probs: list[float]) -> float:
        """Compare the log-probs of a probe prompt with the trainer's own. Generators of recorded responses do not have it.

        Args:
            token_ids: Probe prompt of L tokens.
            log_probs: [L - 1] log p(token t + 1 | tokens 0..t) at temperature 1, by the trainer.

        Returns:
            The largest absolute difference.

        Raises:
            RuntimeError: The difference exceeds ``rollout.verify_sync_tolerance``.
        """
        raise AssertionError(f"{type(self).__name__} computes no log-probs of a probe prompt")

    def sync_metrics(self) -> dict[str, float]:
        """Return metrics of the last weight sync, and of how the servers shared the requests since the sync before it."""
        return {}

    def sleep(self) -> None:
        """Give the device's memory back. Nothing may be in flight."""

    def wake(self, *, weights_only: bool = False) -> None:
        """Take the device's memory again.

        Args:
            weights_only: Whether to take the memory of the weights alone, for a sync.
        """

    @property
    def num_down(self) -> int:
        """Number of servers that died while they could not be restarted, see ``may_restart``."""
        return 0

    def may_restart(self, allowed: bool) -> None:
        """Set whether a server that dies is restarted at once, or waits for ``restart_down``.

        Args:
            allowed: Whether servers may start. False while the trainer has the devices that it shares with them.
        """

    def restart_down(self) -> None:
        """Restart the servers that are down. They are awake and have the newest weights when this returns."""

    @property
    def weights_key(self) -> str:
        """Name of the weights by their content, for responses that are kept on disk. Only generators that can resume have it."""
        raise AssertionError(f"{type(self).__name__} resumes no responses")


class NullGenerator(Generator):
    """Stands for the generator of another rank.

    Args:
        capabilities: Capabilities of the generator that answers.
    """

    is_here = False

    def __init__(self, capabilities: Capabilities) -> None:
        self.capabilities = capabilities

    def generate(
        self,
        request: GenerationRequest,
        *,
        on_response: OnResponse | None = None,
        on_stalled: Callable[[], None] | None = None,
    ) -> list[list[Response]]:
        raise AssertionError("this rank has no generator; it gets the responses from the generator's rank")

    def sync_weights(self, tensors: Iterator[tuple[str, Tensor]], version: str, *, target: str = POLICY) -> None:
        """Read the tensors to their end where the generator's rank does, since making them is collective."""
        check_target(target)
        if self.capabilities.needs_weight_sync:
            for _ in tensors:
                pass

"""Responses that one step leaves incomplete and a later step continues.

With ``rollout.over_sampling`` a step sends more prompts than it needs responses, and takes the first that are complete, so that it does
not wait for the longest one. The others are aborted and kept with their tokens and log-probs. The next step continues them with its own
weights. A token keeps the log-prob of the weights that sampled it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from hetero_ppo.types import PromptBatch, Response

#: finish_reason of a response that is not complete.
ABORTED = "abort"
#: Name of the partial responses in a checkpoint. Checkpoints of all versions have it.
STATE_KEY = "begun"


def continued(partial: Response, rest: Response) -> Response:
    """Return a response that was resumed: tokens and log-probs of both parts, and which weights made how many of them.

    Args:
        partial: First part.
        rest: Second part. It may have no tokens.
    """
    if not rest.token_ids:
        return partial
    own = len(partial.token_ids) - sum(count for _, count in partial.earlier)
    return Response(
        token_ids=partial.token_ids + rest.token_ids,
        log_probs=partial.log_probs + rest.log_probs,
        finish_reason=rest.finish_reason,
        weight_version=rest.weight_version,
        earlier=(*partial.earlier, (partial.weight_version, own)) if own else partial.earlier,
    )


class PartialBuffer:
    """Prompts that wait for a response, the oldest first, each with its partial response. The prompts are the same on every rank.

    A prompt is here once for each of its responses. Only the generator's rank knows the partial responses.

    Args:
        over_sampling: Ratio of the responses that a step starts or resumes to those that it needs, at least 1.
    """

    def __init__(self, over_sampling: float) -> None:
        self.over_sampling = over_sampling
        self.prompts = PromptBatch([], [], [], [], [], [])
        self.partial: list[Response | None] = []

    def __len__(self) -> int:
        return len(self.partial)

    def take(self, num_needed: int, next_prompts: Callable[[], PromptBatch], n: int) -> PromptBatch:
        """Return the prompts of a step: the oldest first, and new ones after them.

        Args:
            num_needed: Responses that the step needs.
            next_prompts: Source of new prompts. It is called until there are enough.
            n: Responses per new prompt.
        """
        size = math.ceil(num_needed * self.over_sampling)
        while len(self) < size:
            fresh = next_prompts()
            fresh = fresh.select([row for row in range(len(fresh)) for _ in range(n)])
            self.prompts = PromptBatch(
                **{name: value + vars(fresh)[name] for name, value in vars(self.prompts).items()}
            )
            self.partial += [None] * len(fresh)
        return self.prompts.select(range(size))

    def keep(self, complete: set[int], responses: dict[int, Response]) -> None:
        """Drop the prompts whose responses a step has used, and keep the others with their partial responses.

        Args:
            complete: Places among the step's prompts whose responses the step has used.
            responses: Partial responses of the others, by place. Empty on ranks without the generator.
        """
        for place, response in responses.items():
            self.partial[place] = response if response.token_ids else None
        rest = [place for place in range(len(self)) if place not in complete]
        self.prompts = self.prompts.select(rest)
        self.partial = [self.partial[place] for place in rest]

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON."""
        partial = [None if response is None else asdict(response) for response in self.partial]
        return {"prompts": vars(self.prompts), STATE_KEY: partial}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of a checkpoint.

        Raises:
            ValueError: Prompts wait for a response, and this run would never send them.
        """
        if state[STATE_KEY] and self.over_sampling == 1.0:
            raise ValueError(
                f"rollout.over_sampling=1: in the checkpoint {len(state[STATE_KEY])} prompts wait for a response, some of them with "
                "partial ones; set it above 1, as in the run that wrote the checkpoint"
            )
        self.prompts = PromptBatch(**state["prompts"])
        self.partial = [None if values is None else _response(values) for values in state[STATE_KEY]]


def _response(values: dict[str, Any]) -> Response:
    response = Response(**values)
    return replace(response, earlier=tuple((label, count) for label, count in response.earlier))

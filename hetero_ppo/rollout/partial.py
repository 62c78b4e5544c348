"""Responses that a step leaves unfinished, and that a later one goes on with.

With ``rollout.partial`` a step sends more prompts than it needs responses, and takes the first that are complete: nobody waits for
the longest one. The others are aborted and kept with their tokens and log-probs, and the next step goes on from prompt and tokens
under its new weights, with the tokens that are left. A token keeps the log-prob that the weights gave it that sampled it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from hetero_ppo.types import PromptBatch, Response

#: finish_reason of a response that is not complete.
ABORTED = "abort"


def continued(begun: Response, rest: Response) -> Response:
    """A response that was resumed: tokens and log-probs of both parts, and which weights made how many of them.

    Args:
        begun: what there was.
        rest: what came after it; without tokens when nothing did.
    """
    if not rest.token_ids:
        return begun
    own = len(begun.token_ids) - sum(count for _, count in begun.earlier)
    return Response(
        token_ids=begun.token_ids + rest.token_ids,
        log_probs=begun.log_probs + rest.log_probs,
        finish_reason=rest.finish_reason,
        weight_version=rest.weight_version,
        earlier=(*begun.earlier, (begun.weight_version, own)) if own else begun.earlier,
    )


class PartialBuffer:
    """Prompts that wait for a response, the oldest first, each with what there is of it. The same prompts on every rank.

    A prompt is here once for each of its responses. What was begun is known on the engine's rank alone.

    Args:
        over_sampling: responses begun or resumed in a step over those that it needs, at least 1.
    """

    def __init__(self, over_sampling: float) -> None:
        self.over_sampling = over_sampling
        self.prompts = PromptBatch([], [], [], [], [], [])
        self.begun: list[Response | None] = []

    def __len__(self) -> int:
        return len(self.begun)

    def take(self, num_wanted: int, next_prompts: Callable[[], PromptBatch], n: int) -> PromptBatch:
        """The prompts of a step: enough of the oldest, new ones behind them.

        Args:
            num_wanted: responses that the step needs.
            next_prompts: asked for prompts until there are enough.
            n: responses per new prompt.
        """
        size = math.ceil(num_wanted * self.over_sampling)
        while len(self) < size:
            fresh = next_prompts()
            fresh = fresh.select([row for row in range(len(fresh)) for _ in range(n)])
            self.prompts = PromptBatch(**{name: value + vars(fresh)[name] for name, value in vars(self.prompts).items()})
            self.begun += [None] * len(fresh)
        return self.prompts.select(range(size))

    def keep(self, complete: set[int], responses: dict[int, Response]) -> None:
        """After a step: what it used goes, what it began stays.

        Args:
            complete: places among the step's prompts whose responses the step has used.
            responses: of the other places, as far as they came; empty on ranks without the engine.
        """
        for place, response in responses.items():
            self.begun[place] = response if response.token_ids else None
        rest = [place for place in range(len(self)) if place not in complete]
        self.prompts = self.prompts.select(rest)
        self.begun = [self.begun[place] for place in rest]

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        begun = [None if response is None else asdict(response) for response in self.begun]
        return {"prompts": vars(self.prompts), "begun": begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of ``state_dict``.

        Raises:
            ValueError: prompts wait, and this run never comes to them.
        """
        if state["begun"] and self.over_sampling == 1.0:
            raise ValueError(
                f"rollout.over_sampling=1: in the checkpoint {len(state['begun'])} prompts wait for a response, some of them "
                "begun; set it above 1, as the run had it that wrote the checkpoint"
            )
        self.prompts = PromptBatch(**state["prompts"])
        self.begun = [None if values is None else _response(values) for values in state["begun"]]


def _response(values: dict[str, Any]) -> Response:
    response = Response(**values)
    return replace(response, earlier=tuple((label, count) for label, count in response.earlier))

"""Rollouts of the responses that are complete first: which rows they are, and how old their weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from hetero_ppo.config.schema import SamplingConfig
from hetero_ppo.errors import RunError
from hetero_ppo.experience.pending_rollout import PendingRollout
from hetero_ppo.rollout.generator import Capabilities, GenerationRequest, NullGenerator
from hetero_ppo.rollout.partial import ABORTED, PartialBuffer, continued
from hetero_ppo.rollout.replay import rollout_records
from hetero_ppo.types import OnResponse, PromptBatch, Response

pytestmark = pytest.mark.usefixtures("world")

SAMPLING = SamplingConfig(max_tokens=8)
WANTED = 3


class Scripted(NullGenerator):
    """Gives place p a response of 2 tokens more; those of ``order`` complete, one after the other, until enough have."""

    def __init__(self, version: str, order: list[int]) -> None:
        super().__init__(Capabilities(can_resume=True))
        self.version = version
        self.order = order

    is_here = True

    def generate(
        self,
        request: GenerationRequest,
        *,
        on_response: OnResponse | None = None,
        on_stalled: Callable[[], None] | None = None,
    ) -> list[list[Response]]:
        assert request.partial is not None and on_response is not None
        responses = []
        for place, partial in enumerate(request.partial):
            reason = "stop" if place in self.order else ABORTED
            rest = Response([10 + place, 20], [-1.0, -2.0], reason, self.version)
            late = partial is not None and partial.finish_reason != ABORTED
            responses.append(partial if late else rest if partial is None else continued(partial, rest))
        for place in self.order[: request.num_rows]:
            on_response(place, 0, responses[place])
        return [[response] for response in responses]


def next_prompts() -> PromptBatch:
    return PromptBatch([[1], [2, 2], [3, 3, 3]], ["1", "2", "3"], [None] * 3, [1, 2, 3], [None] * 3, [{}] * 3)


def started(generator: Scripted, buffer: PartialBuffer, version: str) -> PendingRollout:
    prompts = buffer.take(WANTED, next_prompts, n=1)
    partial = buffer.partial[: len(prompts)]
    request = GenerationRequest(prompts, SAMPLING, n=1, seed=0, partial=partial, num_needed=WANTED)
    return PendingRollout(generator, request, dist.group.WORLD, generator_rank=0, version=version, chunk_size=2).start()


def finished(generator: Scripted, buffer: PartialBuffer, version: str) -> PendingRollout:
    made = started(generator, buffer, version)
    while not made.finished:
        made.next_chunks()
    buffer.keep(*made.unused())
    return made


def test_rows_are_in_the_order_of_completion_and_the_rest_is_resumed() -> None:
    buffer = PartialBuffer(4 / 3)  # 4 places for 3 rows
    first = finished(Scripted("step0", [2, 0, 3]), buffer, "step0")
    rollout = first.rollout()
    assert rollout.prompt_index == [3, 1, 1] and rollout.chunk_index == [0, 0, 1]
    assert rollout.token_ids.tolist() == [[3, 3, 3, 12, 20], [1, 10, 20, 0, 0], [1, 13, 20, 0, 0]]
    assert first.metrics() == {
        "rollout/resumed_share": 0.0,
        "rollout/stale_token_share": 0.0,
        "rollout/weight_versions_max": 1.0,
    }
    assert buffer.prompts.prompt_index == [2, 2, 3]  # one with a partial response, and two that were not yet sent

    second = finished(Scripted("step1", [3, 0, 1, 2]), buffer, "step1")
    rollout = second.rollout()
    assert rollout.token_ids[1].tolist() == [2, 2, 11, 20, 10, 20]  # two tokens of step0, two of step1
    assert rollout.rollout_log_probs[1].tolist() == [0.0, -1.0, -2.0, -1.0, -2.0]
    assert rollout.weight_version == ["step1"] * 3 and rollout.earlier_versions == [[], [("step0", 2)], []]
    assert second.metrics() == pytest.approx(
        {"rollout/resumed_share": 1 / 3, "rollout/stale_token_share": 2 / 8, "rollout/weight_versions_max": 2.0}
    )
    records = rollout_records(rollout, 2, {})
    assert records[1].extra["earlier_versions"] == [("step0", 2)] and "earlier_versions" not in records[0].extra

    # The last of the second step was complete, but as the fourth: it is the next step's, as it is.
    assert [response is not None and response.finish_reason for response in buffer.partial[:1]] == ["stop"]
    third = finished(Scripted("step2", [0, 1, 2]), buffer, "step2")
    assert third.rollout().weight_version == ["step1", "step2", "step2"]
    assert third.metrics()["rollout/stale_token_share"] == pytest.approx(2 / 6)
    assert torch.equal(third.rollout().response_lengths, torch.tensor([2, 2, 2]))


def test_new_tokens_of_other_weights_are_an_error_with_over_sampling_too() -> None:
    made = started(Scripted("step0", [0, 1, 2]), PartialBuffer(4 / 3), "step1")
    with pytest.raises(RunError, match=r"answers made by weights \['step0'\], the actor is at 'step1'"):
        made.next_chunks()

"""Responses that are resumed: what they keep, what waits for the next step, and what a checkpoint has of it."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from tests.helpers.generator_requests import prompts_of

from hetero_ppo.config.schema import SamplingConfig
from hetero_ppo.rollout.checks import check_request
from hetero_ppo.rollout.generator import Capabilities, GenerationRequest
from hetero_ppo.rollout.partial import ABORTED, PartialBuffer, continued
from hetero_ppo.types import PromptBatch, Response


def aborted(tokens: list[int], version: str) -> Response:
    return Response(tokens, [-0.5 * token for token in tokens], ABORTED, version)


def test_a_resumed_response_keeps_the_log_probs_and_labels_of_its_parts() -> None:
    first = aborted([1, 2], "step1")
    second = continued(first, aborted([3], "step2"))
    third = continued(second, aborted([], ""))  # a step in which it got no token
    last = continued(third, Response([4, 5], [-7.0, -8.0], "stop", "step4"))
    assert third == second
    assert last == Response(
        [1, 2, 3, 4, 5], [-0.5, -1.0, -1.5, -7.0, -8.0], "stop", "step4", earlier=(("step1", 2), ("step2", 1))
    )


def counted(batch_size: int) -> Callable[[], PromptBatch]:
    """Return a function that gives prompts 0, 1, 2, ..., one batch per call."""
    handed_out = iter(range(1000))

    def next_prompts() -> PromptBatch:
        rows = [next(handed_out) for _ in range(batch_size)]
        texts, nothing = [f"{row}?" for row in rows], [None] * batch_size
        return PromptBatch([[row] for row in rows], texts, nothing, rows, nothing, [{}] * batch_size)

    return next_prompts


def test_the_oldest_prompts_come_first_and_every_one_is_used_once() -> None:
    """Two responses for each of 3 prompts are needed, 9 are sent."""
    buffer, next_prompts = PartialBuffer(1.5), counted(3)
    first = buffer.take(6, next_prompts, n=2)
    assert first.prompt_index == [0, 0, 1, 1, 2, 2, 3, 3, 4] and len(buffer) == 12
    late = Response([9], [-1.0], "stop", "step0")  # complete, but after the sixth
    buffer.keep({0, 1, 2, 4, 5, 8}, {3: aborted([7, 8], "step0"), 6: aborted([], ""), 7: late})
    assert buffer.prompts.prompt_index == [1, 3, 3, 4, 5, 5]
    assert buffer.partial == [aborted([7, 8], "step0"), None, late, None, None, None]
    second = buffer.take(6, next_prompts, n=2)
    assert second.prompt_index == [1, 3, 3, 4, 5, 5, 6, 6, 7]
    assert second.prompt_texts[0] == "1?"


def test_a_checkpoint_brings_back_partial_responses() -> None:
    buffer = PartialBuffer(2.0)
    buffer.take(2, counted(2), n=1)
    resumed = continued(aborted([5], "step0"), aborted([6], "step1"))
    buffer.keep({0, 3}, {1: resumed, 2: aborted([], "")})
    loaded = PartialBuffer(2.0)
    loaded.load_state_dict(json.loads(json.dumps(buffer.state_dict())))
    assert loaded.partial == buffer.partial == [resumed, None]
    assert loaded.prompts == buffer.prompts and len(loaded) == 2
    with pytest.raises(ValueError, match="rollout.over_sampling=1: in the checkpoint 2 prompts wait"):
        PartialBuffer(1.0).load_state_dict(buffer.state_dict())
    PartialBuffer(1.0).load_state_dict(PartialBuffer(1.0).state_dict())


def check(
    partial: list[Response | None] | None, num_needed: int | None, limits: list[int], n: int, *, can_resume: bool = True
) -> None:
    prompts, sampling = prompts_of([[5]] * len(limits)), SamplingConfig()
    request = GenerationRequest(
        prompts, sampling, n=n, seed=0, max_tokens=limits, partial=partial, num_needed=num_needed
    )
    check_request(request, Capabilities(can_resume=can_resume), 8)


def test_what_cannot_be_resumed_is_refused() -> None:
    check([None, aborted([1, 2], "a")], 2, [3, 3], 1)
    check([Response([1, 2, 3], [0.0] * 3, "length", "a")], None, [3], 1)  # complete already
    with pytest.raises(ValueError, match="partial response 1 has 3 tokens, and may have 3"):
        check([None, aborted([1, 2, 3], "a")], 2, [3, 3], 1)
    with pytest.raises(ValueError, match="partial has 1 responses for 1 prompts with 2 each"):
        check([None], None, [3], 2)
    with pytest.raises(ValueError, match=r"num_needed=3 is not in 1\.\.2"):
        check(None, 3, [3, 3], 1)
    check(None, None, [3], 1, can_resume=False)
    for partial, num_needed in (([None], None), (None, 1)):
        with pytest.raises(ValueError, match="this generator resumes and aborts no responses"):
            check(partial, num_needed, [3], 1, can_resume=False)

"""Steps of which nothing can be learned: responses without a token, and masks without one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.unit.test_reward_function import maker_of, rollout_of

from hetero_ppo.config.schema import RewardConfig, TruncatedResponses
from hetero_ppo.errors import RunError
from hetero_ppo.experience.rollouts import build_rollout
from hetero_ppo.types import Experience, PromptBatch


def assembled(truncated: list[bool], *, whiten: bool) -> Experience:
    """Return the experience of a step with ``algorithm.truncated=mask``."""
    rows = len(truncated)
    maker = maker_of(None, RewardConfig())
    maker.algorithm.truncated, maker.algorithm.whiten_advantages = TruncatedResponses.mask, whiten
    rollout = dataclasses.replace(rollout_of([None] * rows), truncated=torch.tensor(truncated))
    zeros = torch.zeros(rows, 4)
    forwards = {"values": zeros, "ref_log_probs": zeros, "old_log_probs": zeros}
    return maker.assemble(rollout, {"scores": torch.arange(rows).float(), **forwards})


@pytest.mark.parametrize("whiten", [True, False])
def test_a_step_whose_responses_are_all_masked_stops_the_run(whiten: bool) -> None:
    with pytest.raises(
        RunError, match=r"no response of the step has a token .*rollout.sampling.max_tokens, or .*penalise"
    ):
        assembled([True, True, True], whiten=whiten)


def test_one_response_that_is_not_masked_is_enough() -> None:
    experience = assembled([True, False, True], whiten=True)
    assert experience.response_mask.any(dim=1).tolist() == [False, True, False]
    for tensor in (experience.advantages, experience.returns, experience.token_level_rewards):
        assert bool(tensor.isfinite().all()) and not tensor[0].any() and not tensor[2].any()


def test_a_response_without_a_token_is_refused() -> None:
    prompts = PromptBatch(**{**prompt_fields(2), "prompt_ids": [[5, 6], [7]]})
    tokens, lengths = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([3, 0])
    with pytest.raises(
        ValueError, match="response 1 has no token; the generator must return the end-of-sequence token"
    ):
        build_rollout(prompts, lengths, tokens, torch.zeros(2, 3), torch.zeros(2, dtype=torch.bool), "step0")


def prompt_fields(rows: int) -> dict[str, list]:
    values = {field.name: [None] * rows for field in dataclasses.fields(PromptBatch)}
    return values | {"metadata": [{}] * rows}

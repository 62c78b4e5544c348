"""Rollout files and the generator that answers from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.helpers.generator_contract import LIMITS, PROMPTS, GeneratorContract
from tests.helpers.generator_requests import ask

from hetero_ppo.config.schema import SamplingConfig
from hetero_ppo.rollout.replay import (
    ReplayGenerator,
    RolloutRecord,
    read_rollouts,
    recorded_steps,
    rollout_records,
    step_path,
    write_records,
    write_rollouts,
)
from hetero_ppo.types import Rollout

SAMPLING = SamplingConfig(max_tokens=4)


def make_rollout() -> Rollout:
    """Make a rollout with prompts [5, 6] and [7], and responses [8, 9, 1] and [2, 3], the second one truncated."""
    log_probs = torch.tensor([[0.0, -0.1, -0.2, -1.0 / 3], [-2.5, -1e-7, 0.0, 0.0]])
    return Rollout(
        token_ids=torch.tensor([[5, 6, 8, 9, 1], [7, 2, 3, 0, 0]]),
        prompt_lengths=torch.tensor([2, 1]),
        sequence_lengths=torch.tensor([5, 3]),
        response_mask=log_probs != 0,
        rollout_log_probs=log_probs,
        truncated=torch.tensor([False, True]),
        weight_version=["step_3", "step_3"],
        prompt_texts=["five six", "seven"],
        prompt_index=[11, 4],
        labels=["x", None],
    )


def record(step: int, prompt: list[int], response: list[int]) -> RolloutRecord:
    return RolloutRecord(step, 0, prompt, response, [-1.0] * len(response), "length", f"step_{step}")


def test_a_rollout_survives_the_file_exactly(tmp_path: Path) -> None:
    path = write_rollouts(tmp_path, 4, make_rollout(), {"score": [0.5, -1.5]})
    first, second = read_rollouts(path)
    assert path.name == "step_000004.jsonl" and list(tmp_path.iterdir()) == [path]
    assert (first.prompt_ids, first.response_ids) == ([5, 6], [8, 9, 1])
    assert (second.prompt_ids, second.response_ids) == ([7], [2, 3])
    assert torch.equal(torch.tensor(first.rollout_log_probs), torch.tensor([-0.1, -0.2, -1.0 / 3]))
    assert torch.equal(torch.tensor(second.rollout_log_probs), torch.tensor([-2.5, -1e-7]))
    assert (first.finish_reason, second.finish_reason) == ("stop", "length")
    assert (first.label, second.label, first.extra) == ("x", None, {"score": 0.5})
    assert rollout_records(make_rollout(), 4, {"score": [0.5, -1.5]}) == [first, second]


def test_replay_answers_by_prompt_and_step(tmp_path: Path) -> None:
    write_records(tmp_path, 1, [record(1, [5], [10]), record(1, [6], [11]), record(1, [5], [12]), record(1, [6], [13])])
    write_records(tmp_path, 2, [record(2, [7], [14])])
    generator = ReplayGenerator(tmp_path)
    reported: list[tuple[int, int, list[int]]] = []
    answers = ask(
        generator,
        [[6], [5]],
        SAMPLING,
        n=2,
        seed=0,
        on_response=lambda i, j, response: reported.append((i, j, response.token_ids)),
    )
    assert reported == [(0, 0, [11]), (0, 1, [13]), (1, 0, [10]), (1, 1, [12])]
    assert [[r.token_ids for r in group] for group in answers] == [[[11], [13]], [[10], [12]]]
    assert ask(generator, [[7]], SAMPLING, n=1, seed=0)[0][0].weight_version == "step_2"
    with pytest.raises(ValueError, match="every recorded step has been replayed"):
        ask(generator, [[7]], SAMPLING, n=1, seed=0)


class TestContract(GeneratorContract):
    """The contract of every generator, as far as recorded responses can meet it."""

    @pytest.fixture
    def generator(self, tmp_path: Path) -> ReplayGenerator:
        records = [
            RolloutRecord(
                1, prompt, PROMPTS[prompt], [7] * limit, [-0.5] * limit, "length", "initial", chunk=int(prompt == 0)
            )
            for prompt, limit in enumerate(LIMITS)
            for _ in range(2)
        ]
        write_records(tmp_path, 1, records)
        return ReplayGenerator(tmp_path)


def test_replay_starts_at_a_step(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        write_records(tmp_path, step, [record(step, [5], [step])])
    assert recorded_steps(tmp_path) == [1, 2, 10]
    with ReplayGenerator(tmp_path, first_step=2) as generator:
        assert [ask(generator, [[5]], SAMPLING, n=1, seed=0)[0][0].token_ids for _ in range(2)] == [[2], [10]]
    with pytest.raises(ValueError, match="step 3 was not recorded"):
        ReplayGenerator(tmp_path, first_step=3)


def test_replay_refuses_other_prompts_and_longer_responses(tmp_path: Path) -> None:
    write_records(tmp_path, 1, [record(1, [5], [10, 10, 10, 10, 10])])
    generator = ReplayGenerator(tmp_path)
    with pytest.raises(ValueError, match="prompt 0 of this step .* needs 1 recorded responses, 0 are left"):
        ask(generator, [[6]], SAMPLING, n=1, seed=0)
    with pytest.raises(ValueError, match="needs 2 recorded responses, 1 are left"):
        ask(generator, [[5]], SAMPLING, n=2, seed=0)
    with pytest.raises(ValueError, match="has 5 tokens, sampling.max_tokens is 4"):
        ask(generator, [[5]], SAMPLING, n=1, seed=0)
    with pytest.raises(ValueError, match="no step_"):
        ReplayGenerator(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": None}, "'prompt_ids' is null, expected list of int"),
        ({"response_ids": [1, "a"]}, "'response_ids' is .*expected list of int"),
        ({"rollout_log_probs": [-1.0]}, "'rollout_log_probs' has 1 values for 2 response tokens"),
        ({"finish_reason": "abort"}, "'finish_reason' is 'abort'"),
        ({"weight_version": ...}, "'weight_version' is missing"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = write_records(tmp_path, 1, [record(1, [5], [10, 11])] * 2)
    lines = path.read_text().splitlines()
    values = {name: value for name, value in (json.loads(lines[1]) | change).items() if value is not ...}
    path.write_text(lines[0] + "\n" + json.dumps(values) + "\n")
    with pytest.raises(ValueError, match=rf"step_000001\.jsonl:2: field {message}"):
        read_rollouts(path)


def test_broken_json_and_empty_files_are_named(tmp_path: Path) -> None:
    path = step_path(tmp_path, 1)
    path.write_text("{\n")
    with pytest.raises(ValueError, match=r"jsonl:1: not JSON"):
        read_rollouts(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"jsonl:1: expected a JSON object, found list"):
        read_rollouts(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no rollouts in this file"):
        read_rollouts(path)

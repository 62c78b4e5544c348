"""A reward function can fail in several ways; each has its treatment of the response."""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.helpers.one_rank import ONE_RANK
import torch

from hetero_ppo.algorithms.advantage_registry import build_estimator
from hetero_ppo.algorithms.kl import build_kl_controller
from hetero_ppo.algorithms.rewards import RunningMoments
from hetero_ppo.config.schema import AlgorithmConfig, RewardConfig, RewardErrors, RewardSource
from hetero_ppo.errors import RunError
from hetero_ppo.experience.scorers import Scorers
from hetero_ppo.experience.stages import ExperienceMaker
from hetero_ppo.step.phases import ppo_phases
from hetero_ppo.reward.function import FunctionReward
from hetero_ppo.trainers.ppo_evaluation import score_column
from hetero_ppo.types import Rollout

FUNCTION_ALONE = RewardConfig(source=RewardSource.function, normalise=True)
FUNCTION = """
import time

def score(prompt, response, label, metadata):
    if label == "raise":
        raise KeyError("no such word")
    if label == "hang":
        time.sleep(5)
    return {"nan": float("nan"), "infinite": float("inf"), "text": "1.0", "list": [1.0, 2.0], "none": None}.get(label, label)
"""


def rollout_of(labels: list[object]) -> Rollout:
    """Make a rollout with prompts of two tokens and responses of three."""
    rows = len(labels)
    return Rollout(
        token_ids=torch.arange(5).expand(rows, 5).contiguous(),
        sequence_lengths=torch.full((rows,), 5),
        prompt_lengths=torch.full((rows,), 2),
        response_mask=torch.tensor([[False, True, True, True]]).expand(rows, 4).contiguous(),
        rollout_log_probs=torch.zeros(rows, 4),
        truncated=torch.zeros(rows, dtype=torch.bool),
        prompt_index=list(range(10, 10 + rows)),
        prompt_texts=["p"] * rows,
        labels=labels,
        metadata=[{} for _ in labels],
        weight_version=["step0"] * rows,
    )


def reward_of(tmp_path: Path, on_error: RewardErrors) -> FunctionReward:
    (tmp_path / "reward.py").write_text(FUNCTION)
    return FunctionReward(
        f"{tmp_path}/reward.py:score", lambda ids: "answer", timeout_s=1.0, on_error=on_error, world=ONE_RANK
    )


BAD = {
    "raise": r"failed for dataset row 11 \(response 'answer'\): KeyError: 'no such word'",
    "hang": r"failed for dataset row 11 .*TimeoutError: it did not end within reward.timeout_s=1 ",
    "nan": r"gave nan for dataset row 11 .*must return a finite number",
    "infinite": "gave inf for dataset row 11",
    "text": r"gave '1.0' for dataset row 11",
    "list": r"gave \[1.0, 2.0\] for dataset row 11",
    "none": "gave None for dataset row 11",
}


@pytest.mark.parametrize("label", BAD)
def test_a_fault_stops_the_run_naming_the_response(tmp_path: Path, label: str) -> None:
    start = time.monotonic()
    with pytest.raises(RunError, match=BAD[label]):
        reward_of(tmp_path, RewardErrors.stop).score(rollout_of([1.0, label]))
    assert time.monotonic() - start < 4


@pytest.mark.parametrize("label", BAD)
def test_or_leaves_the_response_out_and_scores_the_others(tmp_path: Path, label: str) -> None:
    scores = reward_of(tmp_path, RewardErrors.exclude).score(rollout_of([0.5, label, -2]))
    assert scores[0] == 0.5 and math.isnan(scores[1]) and scores[2] == -2


def maker_of(reward: FunctionReward | None, config: RewardConfig = FUNCTION_ALONE) -> ExperienceMaker:
    models = [] if config.source is RewardSource.function else [SimpleNamespace(role="reward_model", head="score")]
    others = {"actor": "lm", "critic": "value", "reference": "lm"}
    engines = {name: SimpleNamespace(role=name, head=head) for name, head in others.items()}
    return ExperienceMaker(
        engines={**engines, **{model.role: model for model in models}},
        phases=ppo_phases(reward_models=[model.role for model in models], actor_scores_old=True),
        scorers=Scorers(models, reward, config),
        estimator=build_estimator(algorithm := AlgorithmConfig()),
        algorithm=algorithm,
        reward_config=config,
        temperature=1.0,
        kl_controller=build_kl_controller(algorithm.kl),
        score_moments=RunningMoments(),
    )


def test_an_excluded_response_is_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Advantages, returns, running moments and reward metrics are those of the batch without it."""
    reward = reward_of(tmp_path, RewardErrors.exclude)
    made = {}
    for name, labels in (("with", [1.0, "raise", 3.0, -1.0]), ("without", [1.0, 3.0, -1.0])):
        rollout = rollout_of(list(labels))
        kept = [row for row, label in enumerate(labels) if label != "raise"]
        generator = torch.Generator().manual_seed(0)
        values = torch.zeros(len(labels), 4)
        values[kept] = torch.randn(3, 4, generator=generator).masked_fill(~rollout.response_mask[:3], 0)
        zeros = torch.zeros(len(labels), 4)
        computed = {
            "function_scores": reward.score(rollout),
            "values": values,
            "ref_log_probs": zeros,
            "old_log_probs": zeros,
        }
        maker = maker_of(reward)
        made[name] = (maker.assemble(rollout, computed), kept, maker.score_moments.state_dict())
    (found, kept, moments), (expected, _, expected_moments) = made["with"], made["without"]
    for field in ("advantages", "returns", "token_level_rewards", "response_mask"):
        assert torch.equal(getattr(found, field)[kept], getattr(expected, field)), field
    assert not found.response_mask[1].any() and moments == expected_moments
    assert (found.metrics["reward/num_excluded"], expected.metrics["reward/num_excluded"]) == (1.0, 0.0)
    for name in ("reward/mean", "reward/std", "reward/min", "reward/max", "reward/with_kl_mean"):
        assert found.metrics[name] == expected.metrics[name], name


def test_a_function_that_fails_for_all_stops_the_run(tmp_path: Path) -> None:
    reward = reward_of(tmp_path, RewardErrors.exclude)
    rollout = rollout_of(["raise", "nan"])
    zeros = torch.zeros(2, 4)
    with pytest.raises(RunError, match="has failed for every response of the step"):
        maker_of(reward).assemble(
            rollout,
            {"function_scores": reward.score(rollout), "values": zeros, "ref_log_probs": zeros, "old_log_probs": zeros},
        )


def test_a_mix_is_a_weighted_sum_and_lacks_what_the_function_lacks(tmp_path: Path) -> None:
    config = RewardConfig(
        source=RewardSource.mix, model_weight=0.5, function_weight=-2.0, on_error=RewardErrors.exclude
    )
    reward, zeros = reward_of(tmp_path, config.on_error), torch.zeros(3, 4)
    rollout = rollout_of([1.0, "raise", -3.0])
    maker = maker_of(reward, config)
    assert [stage.name for stage in maker.stages()][:2] == ["function_scores", "scores"]
    computed = {"scores": torch.tensor([4.0, 5.0, -6.0]), "function_scores": reward.score(rollout)}
    found = maker.assemble(rollout, computed | {"values": zeros, "ref_log_probs": zeros, "old_log_probs": zeros})
    assert found.scores.outcome[0] == 0.0 and found.scores.outcome[1].isnan() and found.scores.outcome[2] == 3.0
    assert found.token_level_rewards[:, -1].tolist() == [0.0, 0.0, 3.0] and not found.response_mask[1].any()
    expected = {
        "reward/mean": 1.5,
        "reward/num_excluded": 1.0,
        "reward/model/mean": 1.0,
        "reward/function/mean": -1.0,
        "reward/function/std": 2.0,
    }
    assert {name: found.metrics[name] for name in expected} == expected
    assert score_column(found.scores.parts["function"]) == [1.0, None, -3.0]


def test_a_score_that_is_not_finite_is_never_a_models() -> None:
    maker = maker_of(None, RewardConfig())
    zeros = torch.zeros(1, 4)
    computed = {"scores": torch.tensor([math.nan]), "values": zeros, "ref_log_probs": zeros, "old_log_probs": zeros}
    with pytest.raises(FloatingPointError, match="scores has values that are not finite"):
        maker.assemble(rollout_of([1.0]), computed)

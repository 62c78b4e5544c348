"""Scores, log-probs and values become rewards, advantages and weights: every option that takes part, by hand.

The forwards are given, so no role is needed. ``algorithm`` and ``reward`` fields that a case does not name are neutral: gamma and
lambda 1, values 0, no KL penalty, no clipping, no whitening. Then a token's advantage is its response's score.
"""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.helpers.critic_free import GroupMean
from torch import Tensor

import megatron_bridge.platform  # noqa: F401  before megatron.core

from hetero_ppo.algorithms.advantage_registry import build_estimator
from hetero_ppo.algorithms.kl import build_kl_controller
from hetero_ppo.algorithms.rewards import RunningMoments
from hetero_ppo.config.schema import (
    AlgorithmConfig,
    CorrectionLevel,
    EnsembleScore,
    KlConfig,
    KlEstimator,
    OldLogProbs,
    RewardConfig,
    RewardSource,
    RolloutCorrectionConfig,
    RolloutCorrectionKind,
    TruncatedResponses,
)
from hetero_ppo.experience.scorers import FUNCTION_SCORES, Scorers
from hetero_ppo.experience.stages import ExperienceMaker
from hetero_ppo.step.phases import ppo_phases
from hetero_ppo.types import Experience, Rollout, Scores

#: Three responses of 2, 4 and 2 tokens; the second was cut at the length limit.
MASK = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
OLD = torch.tensor([[0.0, -1, -2, 0], [-1, -1, -1, -1], [0, 0, -3, -1]])
#: Its difference from OLD, old - reference: [1, 0], [0, 2, 0, 1], [-2, 0].
REFERENCE = torch.tensor([[0.0, -2, -2, 0], [-1, -3, -1, -2], [0, 0, -1, -1]])
SCORES = torch.tensor([2.0, -1, 4])


def rollout(engine_log_probs: Tensor = OLD) -> Rollout:
    return Rollout(
        token_ids=torch.ones(3, 5, dtype=torch.int64),
        prompt_lengths=torch.tensor([2, 1, 3]),
        sequence_lengths=torch.tensor([4, 5, 5]),
        response_mask=MASK,
        rollout_log_probs=engine_log_probs,
        truncated=torch.tensor([False, True, False]),
        weight_version=["step0"] * 3,
        prompt_texts=["?"] * 3,
        prompt_index=[0, 1, 2],
        labels=[None] * 3,
    )


def make_maker(reward: RewardConfig | None = None, scorers: Scorers | None = None, **algorithm: Any) -> ExperienceMaker:
    reward = reward or RewardConfig(clip=0.0)
    neutral: dict[str, Any] = {"gamma": 1.0, "lam": 1.0, "whiten_advantages": False, "kl": KlConfig(coef=0.0)}
    config = AlgorithmConfig(**{**neutral, **algorithm})
    heads = {"actor": "lm", "critic": "value", "reference": "lm", "reward_model": "score"}
    engines: Any = {name: SimpleNamespace(role=name, head=head) for name, head in heads.items()}
    actor_scores_old = config.old_log_probs is OldLogProbs.actor
    return ExperienceMaker(
        engines=engines,
        phases=ppo_phases(reward_models=["reward_model"], actor_scores_old=actor_scores_old),
        scorers=scorers or Scorers([engines["reward_model"]], None, reward),
        estimator=build_estimator(config),
        algorithm=config,
        reward_config=reward,
        temperature=1.0,
        kl_controller=build_kl_controller(config.kl),
        score_moments=RunningMoments(),
    )


def assemble(maker: ExperienceMaker, *, engine_log_probs: Tensor = OLD, **computed: Tensor) -> Experience:
    given = {
        "scores": SCORES,
        "old_log_probs": OLD,
        "ref_log_probs": REFERENCE,
        "values": torch.zeros(3, 4),
        **computed,
    }
    return maker.assemble(rollout(engine_log_probs), given)


@pytest.mark.parametrize(
    ("estimator", "rewards"),
    [
        # -0.5 x (old - reference), and the score on the last token
        (KlEstimator.k1, [[0, -0.5, 2, 0], [0, -1, 0, -1.5], [0, 0, 1, 4]]),
        # -0.5 x (old - reference)^2 / 2
        (KlEstimator.k2, [[0, -0.25, 2, 0], [0, -1, 0, -1.25], [0, 0, -1, 4]]),
    ],
)
def test_token_rewards_are_the_score_less_the_kl_penalty(estimator: KlEstimator, rewards: list[list[float]]) -> None:
    experience = assemble(make_maker(kl=KlConfig(coef=0.5, estimator=estimator)))
    assert experience.token_level_rewards.tolist() == rewards
    # gamma and lambda are 1 and the values 0: a token's advantage is the sum of the rewards from it on.
    sums = torch.tensor(rewards).flip(1).cumsum(1).flip(1).masked_fill(~MASK, 0)
    assert torch.equal(experience.advantages, sums) and torch.equal(experience.returns, sums)
    assert experience.metrics["kl/coef"] == 0.5
    assert experience.metrics["kl/reference"] == pytest.approx((1 + 3 - 2) / 3)  # k1, whatever the estimator
    assert experience.metrics["reward/with_kl_mean"] == pytest.approx(sum(map(sum, rewards)) / 3)
    assert experience.metrics["reward/mean"] == pytest.approx(5 / 3)


def test_process_scores_are_rewards_at_the_ends_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the KL penalty and the outcome; those of a response that is left out count nowhere."""
    maker = make_maker(kl=KlConfig(coef=0.5), truncated=TruncatedResponses.mask)
    process = torch.tensor([[0.0, 3, -1, 0], [7, 7, 7, 7], [0, 0, 0.5, 0]])
    monkeypatch.setattr(Scorers, "combine", lambda self, computed: Scores(computed["scores"], process))
    experience = assemble(maker)
    assert experience.token_level_rewards.tolist() == [[0, 2.5, 1, 0], [0, 0, 0, 0], [0, 0, 1.5, 4]]
    assert experience.advantages.tolist() == [[0, 3.5, 1, 0], [0, 0, 0, 0], [0, 0, 5.5, 4]]
    assert experience.metrics["reward/mean"] == pytest.approx(5 / 3)  # of outcomes


def test_a_tokens_kl_is_clamped() -> None:
    experience = assemble(make_maker(kl=KlConfig(coef=0.5, clamp=0.5)))
    assert experience.token_level_rewards.tolist() == [[0, -0.25, 2, 0], [0, -0.25, 0, -1.25], [0, 0, 0.25, 4]]


def test_the_penalty_has_the_controllers_coefficient_of_now() -> None:
    maker = make_maker(kl=KlConfig(coef=0.5))
    maker.kl_controller.coef = 1.0
    assert assemble(maker).token_level_rewards[0].tolist() == [0, -1, 2, 0]


def test_gamma_and_lambda() -> None:
    """First row: V = 1, 3 and r = 0, 2, so delta = 0.5 x 3 - 1, 2 - 3 = 0.5, -1, and the decay is 0.5 x 0.25."""
    values = torch.tensor([[9.0, 1, 3, 9], [0, 0, 0, 0], [9, 9, 0, 0]])
    experience = assemble(make_maker(gamma=0.5, lam=0.25), values=values)
    assert experience.advantages[0].tolist() == [0, 0.5 - 0.125, -1, 0]
    assert experience.returns[0].tolist() == [0, 1.375, 2, 0]
    assert experience.values.tolist() == [[0, 1, 3, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_advantages_are_whitened_over_all_tokens_and_returns_are_not() -> None:
    """Advantages 2 (2 tokens), -1 (4) and 4 (2): mean 1, variance (2 x 1 + 4 x 4 + 2 x 9) / 8 = 4.5."""
    experience = assemble(make_maker(whiten_advantages=True))
    plain = torch.tensor([2.0, -1, 4])[:, None] * MASK
    torch.testing.assert_close(experience.advantages, (plain - 1) / math.sqrt(4.5) * MASK)
    assert torch.equal(experience.returns, plain)


def last_rewards(experience: Experience) -> list[float]:
    return experience.token_level_rewards.sum(dim=1).tolist()


def test_scores_are_clipped() -> None:
    experience = assemble(make_maker(RewardConfig(clip=1.5)))
    assert last_rewards(experience) == [1.5, -1, 1.5]
    assert experience.scores.outcome.tolist() == [2, -1, 4] and experience.metrics["reward/max"] == 4  # these are raw


def test_scores_are_normalised_by_the_moments_of_all_steps_and_then_clipped() -> None:
    """1, 1, 4: mean 2, variance 2. With 7, 7, 7 after them: mean 4.5, variance 7.25."""
    maker = make_maker(RewardConfig(normalise=True, clip=1.0))
    first = assemble(maker, scores=torch.tensor([1.0, 1, 4]))
    assert last_rewards(first) == pytest.approx([-(0.5**0.5), -(0.5**0.5), 1.0])
    second = assemble(maker, scores=torch.tensor([7.0, 7, 7]))
    assert last_rewards(second) == pytest.approx([2.5 / 7.25**0.5] * 3)


@pytest.mark.parametrize(
    ("truncated", "rewards"),
    [
        (TruncatedResponses.score, [1.5, -1, 1.5]),
        (TruncatedResponses.penalise, [1.5, -3, 1.5]),  # as the policy sees it: neither normalised nor clipped
        (TruncatedResponses.mask, [1.5, 0, 1.5]),
    ],
)
def test_truncated_responses(truncated: TruncatedResponses, rewards: list[float]) -> None:
    maker = make_maker(RewardConfig(clip=1.5), truncated=truncated, truncation_score=-3.0, whiten_advantages=True)
    experience = assemble(maker)
    assert last_rewards(experience) == rewards
    is_masked = truncated is TruncatedResponses.mask
    assert experience.response_mask.any(dim=1).tolist() == [True, not is_masked, True]
    tokens = experience.advantages[experience.response_mask]  # whitening does not see what is masked
    assert float(tokens.mean()) == pytest.approx(0, abs=1e-6)
    assert experience.metrics["response_length/clip_ratio"] == pytest.approx(1 / 3)


def test_a_response_without_a_score_teaches_nothing() -> None:
    """The function failed for the first one: its tokens are in no loss, its score in no mean and no moment."""
    reward = RewardConfig(source=RewardSource.function, clip=0.0, normalise=True)
    maker = make_maker(reward, Scorers([], None, reward))
    experience = assemble(maker, **{FUNCTION_SCORES: torch.tensor([math.nan, 1, 3])})
    assert experience.response_mask.any(dim=1).tolist() == [False, True, True]
    assert last_rewards(experience) == pytest.approx([0, -1, 1])
    assert experience.metrics["reward/num_excluded"] == 1 and experience.metrics["reward/mean"] == 2


#: exp(old - engine): 1, 4; 1, 1, 0.5, 1; 1, 2.
ENGINE = OLD - torch.tensor([[0.0, 0, math.log(4), 0], [0, 0, -math.log(2), 0], [0, 0, 0, math.log(2)]])


@pytest.mark.parametrize(
    ("level", "weights"),
    [
        (CorrectionLevel.token, [[0, 1, 1.5, 0], [1, 1, 0.5, 1], [0, 0, 1, 1.5]]),
        (CorrectionLevel.sequence, [[0, 1.5, 1.5, 0], [0.5] * 4, [0, 0, 1.5, 1.5]]),
    ],
)
def test_importance_weights(level: CorrectionLevel, weights: list[list[float]]) -> None:
    correction = RolloutCorrectionConfig(kind=RolloutCorrectionKind.truncated, cap=1.5, level=level)
    experience = assemble(make_maker(rollout_correction=correction), engine_log_probs=ENGINE)
    assert experience.tis_weights is not None
    torch.testing.assert_close(experience.tis_weights, torch.tensor(weights, dtype=torch.float32))
    assert assemble(make_maker(), engine_log_probs=ENGINE).tis_weights is None
    assert experience.metrics["rollout/log_prob_diff_max"] == pytest.approx(math.log(4))


def test_old_log_probs_of_the_engine() -> None:
    maker = make_maker(old_log_probs=OldLogProbs.rollout, kl=KlConfig(coef=1.0))
    given = {"scores": SCORES, "ref_log_probs": REFERENCE, "values": torch.zeros(3, 4)}
    experience = maker.assemble(rollout(ENGINE), given)
    assert torch.equal(experience.old_log_probs, ENGINE) and experience.tis_weights is None
    assert float(experience.token_level_rewards[0, 2]) == pytest.approx(2 + math.log(4))
    # The actor computes nothing.
    assert [stage.name for stage in maker.stages()] == [
        "scores",
        "ref_log_probs",
        "values",
    ]
    assert [stage.name for stage in make_maker().stages()] == ["scores", "ref_log_probs", "old_log_probs", "values"]


def test_without_a_critic_there_are_neither_values_nor_returns() -> None:
    """The group of all three responses: scores 2, -1 and 4 less their mean 5/3, and whitened where that is asked for."""
    maker = make_maker()
    maker.phases = ppo_phases(reward_models=["reward_model"], actor_scores_old=True, has_critic=False)
    maker.estimator = GroupMean()
    assert [stage.name for stage in maker.stages()] == ["scores", "ref_log_probs", "old_log_probs"]
    given = {"scores": SCORES, "old_log_probs": OLD, "ref_log_probs": REFERENCE}
    experience = maker.assemble(dataclasses.replace(rollout(), prompt_index=[7, 7, 7]), given)
    assert experience.values is None and experience.returns is None
    expected = (SCORES - 5 / 3)[:, None] * MASK
    torch.testing.assert_close(experience.advantages, expected)
    maker.algorithm.whiten_advantages = True
    whitened = maker.assemble(dataclasses.replace(rollout(), prompt_index=[7, 7, 7]), given).advantages
    assert float(whitened[MASK].mean()) == pytest.approx(0, abs=1e-6) and float(
        whitened[MASK].std(correction=0)
    ) == pytest.approx(1, rel=1e-4)


def scorers_of(names: list[str], **reward: Any) -> Scorers:
    models: Any = [SimpleNamespace(role=name) for name in names]
    return Scorers(models, None, RewardConfig(**reward))


@pytest.mark.parametrize(
    ("ensemble", "k", "expected"),
    [(EnsembleScore.mean, 2.0, 2.0), (EnsembleScore.min, 2.0, 1.0), (EnsembleScore.mean_minus_std, 2.0, 0.0)],
)
def test_several_reward_models_give_one_score(ensemble: EnsembleScore, k: float, expected: float) -> None:
    """Scores 1 and 3: mean 2, standard deviation 1."""
    scorers = scorers_of(["reward_models.0", "reward_models.1"], ensemble=ensemble, ensemble_k=k)
    scores = scorers.combine({"scores_0": torch.tensor([1.0]), "scores_1": torch.tensor([3.0])})
    assert scores.outcome.tolist() == [expected]
    assert {name: part.tolist() for name, part in scores.parts.items()} == {
        "model_0": [1.0],
        "model_1": [3.0],
        "ensemble_std": [1.0],
    }


def test_model_and_function_are_mixed_with_their_weights() -> None:
    scorers = scorers_of(["reward_model"], source=RewardSource.mix, model_weight=2.0, function_weight=-0.5)
    scores = scorers.combine({"scores": torch.tensor([1.0, 2.0]), FUNCTION_SCORES: torch.tensor([4.0, math.nan])})
    assert scores.outcome[0] == 0.0 and scores.outcome[1].isnan()


@pytest.mark.parametrize("name", ["scores", "ref_log_probs", "old_log_probs", "values"])
def test_a_forward_that_is_not_finite_is_an_error(name: str) -> None:
    """NaN is no score of a reward model, though it is one of a function that failed."""
    tensor = torch.full((3,) if name == "scores" else (3, 4), math.nan)
    with pytest.raises(FloatingPointError, match=f"{name} has values that are not finite"):
        assemble(make_maker(), **{name: tensor})

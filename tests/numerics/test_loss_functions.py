"""The losses as the engine calls them: every option reaches the term that it is of, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import megatron_bridge.platform  # noqa: F401  before megatron.core
from megatron.core.process_groups_config import ProcessGroupCollection

from hetero_ppo.algorithms.losses import Loss, policy_loss
from hetero_ppo.config.schema import AlgorithmConfig, KlConfig, KlEstimator, ParallelConfig, RewardModelLossConfig
from hetero_ppo.distributed.groups import role_groups
from hetero_ppo.engines.losses import SUM, actor_loss_fn, critic_loss_fn, reward_loss_fn
from hetero_ppo.types import Microbatch, PolicyInputs, ValueInputs

VOCAB = 11


@pytest.fixture(scope="module")
def groups(world: None) -> ProcessGroupCollection:
    return role_groups("actor", ParallelConfig())


def test_weights_reach_the_policy_loss_alone(groups: ProcessGroupCollection) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, VOCAB, (3, 6))
    mask = torch.rand(3, 5) < 0.8
    old, reference = -torch.rand(3, 5) - 1, -torch.rand(3, 5) - 1
    logits = torch.randn(3, 6, VOCAB)
    inputs = PolicyInputs(old, reference, torch.randn(3, 5), mask)
    config = AlgorithmConfig(entropy_coef=0.1, kl=KlConfig(loss_coef=0.2))
    loss_fn = actor_loss_fn(config, 0.7, VOCAB, groups)

    def loss_and_gradient(weights: torch.Tensor | None) -> tuple[Loss, torch.Tensor]:
        given = logits.clone().requires_grad_()
        inputs_of = replace(inputs, tis_weights=weights)
        microbatch = Microbatch(ids, torch.full((3,), 6), inputs_of, torch.ones(3, 6, dtype=torch.bool))
        loss = loss_fn(given.view(1, 18, VOCAB), microbatch)
        loss.loss.backward()
        return loss, given.grad

    (plain, gradient), (ones, gradient_of_ones) = loss_and_gradient(None), loss_and_gradient(torch.ones(3, 5))
    assert torch.equal(plain.loss, ones.loss) and torch.equal(gradient, gradient_of_ones)
    weights = torch.rand(3, 5)
    weighted, _ = loss_and_gradient(weights)
    log_probs = (logits[:, :-1] / 0.7).log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    policy, policy_weighted = (
        policy_loss(log_probs, old, inputs.advantages, mask, config.clip_ratio, None, SUM, given).loss
        for given in (None, weights)
    )
    torch.testing.assert_close(weighted.loss - plain.loss, policy_weighted - policy)
    assert abs(float(policy_weighted - policy)) > 0.1
    for name, value in plain.metric_sums.items():
        assert torch.equal(value, weighted.metric_sums[name]) == (name != "actor/pg_loss"), name


LN2 = math.log(2)
#: Of the one token that came 1/2; the entropy is (1/2 + 1/4 x 2 + 1/8 x 3 x 2) ln 2.
PROBS = torch.tensor([0.5, 0.25, 0.125, 0.125])


def one_token_loss(
    groups: ProcessGroupCollection,
    config: AlgorithmConfig,
    *,
    ratio: float = 1.0,
    advantage: float = 0.0,
    ref_ratio: float = 1.0,
) -> Loss:
    """Return the actor's loss of one token with log-prob ln 1/2 at temperature 0.7, ``ratio`` to the old policy and ``ref_ratio`` to the reference."""
    log_prob = torch.full((1, 1), math.log(0.5))
    inputs = PolicyInputs(
        old_log_probs=log_prob - math.log(ratio),
        ref_log_probs=log_prob - math.log(ref_ratio),
        advantages=torch.full((1, 1), advantage),
        mask=torch.ones(1, 1, dtype=torch.bool),
    )
    microbatch = Microbatch(
        torch.zeros(1, 2, dtype=torch.int64), torch.tensor([2]), inputs, torch.ones(1, 2, dtype=torch.bool)
    )
    logits = (0.7 * PROBS.log()).expand(1, 2, 4).clone().requires_grad_()
    return actor_loss_fn(config, 0.7, 4, groups)(logits, microbatch)


@pytest.mark.parametrize(
    ("options", "ratio", "advantage", "loss"),
    [
        ({}, 1.1, 2.0, -2.2),
        ({"clip_ratio": 0.05}, 1.1, 2.0, -2.1),
        ({}, 5.0, -2.0, 10.0),
        ({"dual_clip": 3.0}, 5.0, -2.0, 6.0),
        ({"entropy_coef": 0.1}, 1.0, 0.0, -0.1 * 1.75 * LN2),
    ],
)
def test_policy_loss_and_entropy_bonus_by_hand(
    groups: ProcessGroupCollection, options: dict[str, float], ratio: float, advantage: float, loss: float
) -> None:
    found = one_token_loss(groups, AlgorithmConfig(**options), ratio=ratio, advantage=advantage)
    assert found.loss.item() == pytest.approx(loss, rel=1e-5)
    assert found.metric_sums["actor/entropy"].item() == pytest.approx(1.75 * LN2, rel=1e-5)


@pytest.mark.parametrize(
    ("estimator", "kl"), [(KlEstimator.k1, LN2), (KlEstimator.k2, LN2**2 / 2), (KlEstimator.k3, 0.5 - 1 + LN2)]
)
def test_kl_loss_by_hand(groups: ProcessGroupCollection, estimator: KlEstimator, kl: float) -> None:
    """The policy gives the token twice the reference's probability."""
    config = AlgorithmConfig(kl=KlConfig(loss_coef=0.2, loss_estimator=estimator))
    assert one_token_loss(groups, config, ref_ratio=2.0).loss.item() == pytest.approx(0.2 * kl, rel=1e-5)
    clamped = AlgorithmConfig(kl=KlConfig(loss_coef=0.2, loss_estimator=estimator, clamp=0.1))
    assert one_token_loss(groups, clamped, ref_ratio=2.0).loss.item() == pytest.approx(0.2 * 0.1, rel=1e-5)
    assert "actor/kl_loss" not in one_token_loss(groups, AlgorithmConfig(), ref_ratio=2.0).metric_sums


def scalar_microbatch(lengths: list[int], inputs: ValueInputs | None = None) -> Microbatch:
    ids = torch.zeros(len(lengths), 3, dtype=torch.int64)
    return Microbatch(ids, torch.tensor(lengths), inputs)


@pytest.mark.parametrize(("value_clip", "loss"), [(None, 0.5 * 0.5**2), (0.2, 0.5 * 0.8**2)])
def test_value_loss_by_hand(value_clip: float | None, loss: float) -> None:
    """Old value 1, value 1.5, return 2, in the second column; the first is masked out."""
    tensors = [torch.tensor([[9.0, x]]) for x in (1.0, 2.0)]
    microbatch = scalar_microbatch([3], ValueInputs(*tensors, torch.tensor([[False, True]])))
    found = critic_loss_fn(AlgorithmConfig(value_clip=value_clip))(torch.tensor([[7.0, 1.5, 7.0]]), microbatch)
    assert found.loss.item() == pytest.approx(loss) and found.count.item() == 1


def test_reward_model_loss_by_hand() -> None:
    """Scores at the sequences' ends: chosen 1 and 2, rejected 0 and 4."""
    scores = torch.tensor([[9.0, 1, 9], [9, 9, 2], [9, 0, 9], [9, 9, 4]])
    microbatch = scalar_microbatch([2, 3, 2, 3])

    def loss(**options: float) -> float:
        return reward_loss_fn(RewardModelLossConfig(**options))(scores, microbatch).loss.item()

    def minus_log_sigmoid(x: float) -> float:
        return math.log1p(math.exp(-x))

    assert loss() == pytest.approx(minus_log_sigmoid(1) + minus_log_sigmoid(-2), rel=1e-6)
    assert loss(margin=0.5) == pytest.approx(minus_log_sigmoid(0.5) + minus_log_sigmoid(-2.5), rel=1e-6)
    assert loss(score_l2=0.1) - loss() == pytest.approx(0.1 * (1 + 4 + 0 + 16) / 2, rel=1e-5)

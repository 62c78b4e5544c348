"""The actor's loss as the engine calls it: importance weights reach the policy's part of it, and that alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import megatron_bridge.platform  # noqa: F401  before megatron.core
from megatron.core.process_groups_config import ProcessGroupCollection

from hetero_ppo.algorithms.losses import Loss, policy_loss
from hetero_ppo.config.schema import AlgorithmConfig, KlConfig, ParallelConfig
from hetero_ppo.distributed.groups import role_groups
from hetero_ppo.engines.losses import SUM, actor_loss_fn
from hetero_ppo.types import Microbatch, PolicyInputs

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

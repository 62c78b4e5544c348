"""Advantage estimators: which one a run has, and whether it goes with the run's critic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.helpers.critic_free import GroupMean, registered

from hetero_ppo.algorithms.advantage_registry import ESTIMATORS, build_estimator, check_advantage
from hetero_ppo.algorithms.advantages import AdvantageInputs
from hetero_ppo.config.load import load_config
from hetero_ppo.config.schema import AlgorithmConfig

MASK = torch.tensor([[False, True, True], [True, True, False]])
REWARDS = torch.tensor([[0.0, 1.0, 2.0], [4.0, 0.0, 0.0]])


def test_gae_is_the_default_and_reads_gamma_and_lambda() -> None:
    """The values are worked out by hand with gamma 0.5 and lambda 0.5: row 0 has deltas 1 + 0.5 x 1 - 0 = 1.5 and 2 - 1 = 1, row 1 4 - 2 = 2 and 0."""
    estimator = build_estimator(AlgorithmConfig(gamma=0.5, lam=0.5))
    values = torch.tensor([[9.0, 0.0, 1.0], [2.0, 0.0, 9.0]])
    found = estimator.estimate(AdvantageInputs(REWARDS, MASK, torch.tensor([0, 1]), values))
    assert estimator.needs_values
    assert found.advantages.tolist() == [[0.0, 1.75, 1.0], [2.0, 0.0, 0.0]]
    assert found.returns is not None and found.returns.tolist() == [[0.0, 1.75, 2.0], [4.0, 0.0, 0.0]]


def test_a_new_estimator_is_one_class_and_one_registration() -> None:
    with registered():
        estimator = build_estimator(AlgorithmConfig(advantage="group_mean"))
        found = estimator.estimate(AdvantageInputs(REWARDS, MASK, torch.tensor([5, 5]), None))
    assert isinstance(estimator, GroupMean) and found.returns is None
    assert found.advantages.tolist() == [[0.0, -0.5, -0.5], [0.5, 0.5, 0.0]]
    assert GroupMean.name not in ESTIMATORS


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.advantage=gea"], "algorithm.advantage=gea: no such estimator; allowed: gae, group_mean"),
        (
            ["critic=null"],
            r"critic=null: algorithm.advantage=gae needs .* give critic.model.path, or choose .* none \(group_mean\)",
        ),
        (
            ["algorithm.advantage=group_mean"],
            "algorithm.advantage=group_mean: the estimator reads no values, .* set critic: null",
        ),
        (["algorithm.advantage=group_mean", "critic=null"], None),
        ([], None),
    ],
)
def test_estimator_and_critic_go_together(tmp_path: Path, overrides: list[str], message: str | None) -> None:
    model = "{model: {path: m}}"
    file = tmp_path / "ppo.yaml"
    file.write_text(
        f"kind: ppo\nrun: {{dir: r}}\ndata: {{train: a}}\nactor: {model}\ncritic: {model}\nreference: {model}\n"
    )
    config = load_config(str(file), overrides).config
    with registered():
        if message is None:
            check_advantage(config)
        else:
            with pytest.raises(ValueError, match=message):
                check_advantage(config)


def test_other_runs_have_no_advantages(tmp_path: Path) -> None:
    file = tmp_path / "sft.yaml"
    file.write_text("kind: sft\nrun: {dir: r}\ndata: {train: a}\nactor: {model: {path: m}}\n")
    check_advantage(load_config(str(file), []).config)

"""An estimator without a critic, for tests: each response's reward less the mean of its group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import pytest

from hetero_ppo.algorithms.advantage_registry import ESTIMATORS
from hetero_ppo.algorithms.advantages import AdvantageEstimator, AdvantageInputs, Advantages
from hetero_ppo.config.schema import AlgorithmConfig


class GroupMean(AdvantageEstimator):
    """The same advantage for every token of a response."""

    name = "group_mean"
    needs_values = False

    @classmethod
    def for_run(cls, config: AlgorithmConfig) -> Self:
        """Build it; it has no options."""
        return cls()

    def estimate(self, inputs: AdvantageInputs) -> Advantages:
        """Return the advantages."""
        assert inputs.values is None
        rewards = inputs.token_level_rewards.sum(dim=1)
        same = (inputs.prompt_index[:, None] == inputs.prompt_index).to(rewards.dtype)
        advantages = rewards - same @ rewards / same.sum(dim=1)
        return Advantages(advantages[:, None] * inputs.response_mask, None)


@contextmanager
def registered() -> Iterator[None]:
    """Register the estimator while the block runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ESTIMATORS, GroupMean.name, GroupMean)
        yield

"""The interface of advantage estimators: from rewards per token to advantages, and to returns where there is a critic."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from hetero_ppo.config.schema import AlgorithmConfig


@dataclass(frozen=True)
class AdvantageInputs:
    """Inputs of an estimator, for B responses. Every rank holds all rows."""

    token_level_rewards: Tensor  # [B, T] float32, 0 outside response_mask
    response_mask: Tensor  # [B, T] bool; the True columns of a row follow each other without a gap, a row that is left out has none
    prompt_index: Tensor  # [B] int64, rows of one group answer the same prompt
    values: Tensor | None  # [B, T] float32, of the state before token t + 1; None: the run has no critic


@dataclass(frozen=True)
class Advantages:
    """Results of an estimator, without a graph."""

    advantages: Tensor  # [B, T] float32, 0 outside response_mask
    returns: Tensor | None  # [B, T] float32, what the critic is trained towards; None: the estimator has none


class AdvantageEstimator(ABC):
    """Turns rewards into advantages. A new estimator is one file here and one line in ``advantage_registry.py``."""

    #: Value of ``algorithm.advantage``.
    name: ClassVar[str]
    #: True: it reads a critic's values and gives returns. False: it reads none, and the run has no critic.
    needs_values: ClassVar[bool]

    @classmethod
    @abstractmethod
    def for_run(cls, config: AlgorithmConfig) -> Self:
        """Build the estimator of a run.

        Args:
            config: Checked section ``algorithm`` of the run.
        """

    @abstractmethod
    def estimate(self, inputs: AdvantageInputs) -> Advantages:
        """Return the advantages of a rollout batch, before they are whitened.

        Args:
            inputs: The whole rollout batch; values are there if and only if ``needs_values``.
        """

"""Sections that SFT and reward-model runs have."""

from __future__ import annotations

from dataclasses import dataclass

from hetero_ppo.config.schema.option import PLAIN, OnResume, option


@dataclass
class SupervisedTrainConfig:
    """Batching and length of an SFT or reward-model run."""

    steps: int | None = option(
        None, "Length of the run; null: epochs decides", unit="optimizer steps", minimum=1, resume=OnResume.applied
    )
    epochs: int = option(
        1, "Passes over the data where steps is null", unit="passes", minimum=1, resume=OnResume.applied
    )
    global_batch_size: int = option(
        32, "Size of an optimizer step over all ranks", unit="examples, or pairs", minimum=1, resume=OnResume.applied
    )
    eval_every: int = option(
        0, "Interval of evaluations; 0: at the end only", unit="steps", minimum=0, resume=OnResume.operation
    )
    eval_batches: int | None = option(
        None, "Size of an evaluation; null: all rows", unit="global batches", minimum=1, resume=OnResume.operation
    )


@dataclass
class RewardModelLossConfig:
    """Loss of preference pairs (Bradley-Terry)."""

    margin: float = option(
        0.0,
        "Margin in -log sigmoid(chosen - rejected - margin)",
        unit="units of the score",
        minimum=0,
        resume=OnResume.objective,
    )
    score_l2: float = option(
        0.0, "Weight of mean(score^2), which keeps scores near 0", unit=PLAIN, minimum=0, resume=OnResume.objective
    )

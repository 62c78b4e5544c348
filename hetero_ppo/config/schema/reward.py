"""Section of what scores responses."""

from __future__ import annotations

from dataclasses import dataclass

from hetero_ppo.config.schema.choices import EnsembleScore, RewardErrors, RewardSource
from hetero_ppo.config.schema.option import PLAIN, OnResume, option


@dataclass
class RewardConfig:
    """Scores of responses: models, functions, and how their scores become one."""

    source: RewardSource = option(RewardSource.model, "Source of a response's score", resume=OnResume.objective)
    function: str | None = option(
        None,
        'Reward function, "package.module:function" or "path/to/file.py:function"; null: none',
        resume=OnResume.content,
    )
    model_weight: float = option(
        1.0,
        "Weight of the model's score with source mix; a negative one makes it a cost",
        unit=PLAIN,
        finite=True,
        resume=OnResume.objective,
    )
    function_weight: float = option(
        1.0, "Weight of the function's score with source mix", unit=PLAIN, finite=True, resume=OnResume.objective
    )
    ensemble: EnsembleScore = option(
        EnsembleScore.mean, "Combination of the scores of reward_models", resume=OnResume.objective
    )
    ensemble_k: float = option(
        1.0,
        "Standard deviations that ensemble mean_minus_std subtracts",
        unit="standard deviations",
        minimum=0,
        finite=True,
        resume=OnResume.objective,
    )
    timeout_s: float = option(
        60.0,
        "Deadline of one call of the function, or of train.eval_function",
        unit="s",
        above=0,
        finite=True,
        resume=OnResume.operation,
    )
    workers: int | None = option(
        None,
        "Number of processes that call the function, and as many for train.eval_function; null: derived and printed",
        unit="processes",
        minimum=1,
        resume=OnResume.operation,
    )
    batch: int | None = option(
        None,
        "Responses of one call; the function then gets lists and returns as many numbers. null: one",
        unit="responses",
        minimum=1,
        resume=OnResume.operation,
    )
    concurrency: int | None = option(
        None,
        "Simultaneous calls of an `async def` function in one process; null: 64",
        unit="calls",
        minimum=1,
        resume=OnResume.operation,
    )
    on_error: RewardErrors = option(
        RewardErrors.stop,
        "Treatment of a response that the function raises for, hangs on, or gives no finite number for",
        resume=OnResume.applied,
    )
    clip: float = option(
        10.0,
        "Largest |score|; 0 switches clipping off",
        unit="units of the score",
        minimum=0,
        resume=OnResume.objective,
    )
    golden_every: int = option(
        50,
        "Interval of checks of the reward model's golden scores; 0: at the start only",
        unit="PPO steps",
        minimum=0,
        resume=OnResume.operation,
    )
    normalise: bool = option(
        False,
        "Scores are reduced by their running mean and divided by their running standard deviation",
        resume=OnResume.objective,
    )

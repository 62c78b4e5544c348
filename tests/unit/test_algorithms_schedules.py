"""Learning-rate schedules."""

import pytest

from hetero_ppo.algorithms.schedules import lr_at
from hetero_ppo.config.schema import LrSchedule, OptimizerConfig


def rates(schedule: LrSchedule, *, warmup: int, total: int, min_lr: float = 0.0) -> list[float]:
    config = OptimizerConfig(lr=1.0, min_lr=min_lr, lr_schedule=schedule, warmup_steps=warmup)
    return [lr_at(step, config, total) for step in range(total)]


def test_constant_with_warm_up() -> None:
    assert rates(LrSchedule.constant, warmup=3, total=6) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_linear() -> None:
    assert rates(LrSchedule.linear, warmup=0, total=4) == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert rates(LrSchedule.linear, warmup=1, total=5, min_lr=0.2) == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4])


def test_cosine() -> None:
    half = 0.5**0.5
    expected = [1.0, 0.5 * (1 + half), 0.5, 0.5 * (1 - half)]
    assert rates(LrSchedule.cosine, warmup=0, total=4) == pytest.approx(expected)
    assert rates(LrSchedule.cosine, warmup=0, total=4, min_lr=0.5) == pytest.approx([0.5 + 0.5 * x for x in expected])


@pytest.mark.parametrize("schedule", [LrSchedule.linear, LrSchedule.cosine])
def test_stays_at_min_lr_after_the_end(schedule: LrSchedule) -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.1, lr_schedule=schedule)
    assert [lr_at(step, config, 10) for step in (10, 50)] == pytest.approx([0.1, 0.1])


def test_a_run_that_ends_within_warm_up() -> None:
    assert rates(LrSchedule.cosine, warmup=4, total=2) == pytest.approx([0.2, 0.4])

from __future__ import annotations

import pytest

from hetero_ppo.runtime.unsaved import LONG_RUN_STEPS, UnsavedWork


def warnings(
    caplog: pytest.LogCaptureFixture, every: int, total: int, step_s: float, steps: int = 8
) -> list[tuple[int, str]]:
    """Return (step, warning) of a run whose first step takes long."""
    now = [0.0]
    work = UnsavedWork(every, total, now=lambda: now[0])
    work.start(0)
    found = [(0, message) for message in caplog.messages]
    for step in range(1, steps + 1):
        caplog.clear()
        now[0] += step_s + (500.0 if step == 1 else 0.0)
        work.step_done(step)
        found += [(step, message) for message in caplog.messages]
    return found


def test_many_steps_are_warned_of_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    ((step, text),) = warnings(caplog, 0, LONG_RUN_STEPS, 0.1)
    assert (
        step == 0
        and text.startswith("checkpoint.every is 0 and the run has 200 steps to go")
        and "loses everything" in text
    )


def test_few_long_steps_are_warned_of_when_they_are_measured(caplog: pytest.LogCaptureFixture) -> None:
    ((step, text),) = warnings(caplog, 0, 100, 60.0)
    assert step == 4 and "about 1.6 h (96 steps of 60 s)" in text and "Set checkpoint.every (10, " in text


@pytest.mark.parametrize(("every", "total", "step_s"), [(0, 100, 1.0), (10, 100, 60.0), (1, 10_000, 60.0)])
def test_short_runs_and_those_that_save_are_not_warned_of(
    every: int, total: int, step_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    assert warnings(caplog, every, total, step_s) == []

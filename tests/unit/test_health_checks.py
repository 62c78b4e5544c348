"""Health checks, judged by hand-made metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from hetero_ppo.config.schema import PpoConfig
from hetero_ppo.errors import RunError
from hetero_ppo.health.check import Finding, HealthCheck, Moment, Severity, run_checks
from hetero_ppo.health.critic import EXPLAINED_VARIANCE, FirstValues
from hetero_ppo.health.mismatch import Bound, MismatchGuard
from hetero_ppo.health.monitor import WARNINGS, HealthMonitor
from hetero_ppo.health.registry import CHECKS

MEAN = Bound("rollout/log_prob_diff_mean", "rollout.mismatch.max_log_prob_diff_mean", 0.1)


class Threshold(HealthCheck):
    """Warns above 1, stops above 2, and remembers how often it was asked."""

    rule = "threshold"
    moment: ClassVar[Moment] = Moment.after_step

    def __init__(self) -> None:
        self.num_steps = 0

    @classmethod
    def for_run(cls, config: PpoConfig) -> Threshold:
        return cls()

    def check(self, step: int, metrics: Mapping[str, float]) -> Finding | None:
        self.num_steps += 1
        value = metrics["x"]
        if value <= 1:
            return None
        severity = Severity.stop if value > 2 else Severity.warning
        return Finding(self.rule, severity, f"x is {value}", step, {"x": value})

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_steps = state["num_steps"]


class OtherThreshold(Threshold):
    """A second rule."""

    rule = "other_threshold"


def lines_of(logged: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.levelname, record.message) for record in logged.records]


def test_first_values_that_are_worse_than_none_are_warned_of() -> None:
    for value, severity, text in (
        (-5.31, Severity.warning, "critic: its values explain -5.31 of the variance of step 1's returns"),
        (0.0, Severity.info, "critic: its values explain 0 of the variance"),
        (0.25, Severity.info, "critic: its values explain 0.25 of"),
        (math.nan, Severity.info, "critic: all returns of step 1 are equal, so its values cannot be rated"),
    ):
        found = FirstValues().check(1, {EXPLAINED_VARIANCE: value})
        assert found is not None and found.severity is severity and found.message.startswith(text)
        assert (
            ("critic.model.head_init=zero" in found.message)
            == ("algorithm.critic_warmup_steps" in found.message)
            == (value < 0)
        )
        assert list(found.values) == [EXPLAINED_VARIANCE] and found.step == 1
    assert FirstValues().check(2, {EXPLAINED_VARIANCE: -5.31}) is None


def test_a_stop_raises_with_the_messages_of_all_that_ask_for_it() -> None:
    checks = [Threshold(), OtherThreshold()]
    assert run_checks(checks, 1, {"x": 0.5}) == []
    assert [finding.rule for finding in run_checks(checks, 2, {"x": 1.5})] == ["threshold", "other_threshold"]
    with pytest.raises(RunError, match=r"^x is 2.5\nx is 2.5$"):
        run_checks(checks, 3, {"x": 2.5})


def test_a_check_runs_at_its_moment_alone() -> None:
    monitor = HealthMonitor([Threshold()])
    monitor.check(Moment.before_training, 1, {})
    with pytest.raises(RunError, match="x is 3"):
        monitor.check(Moment.after_step, 1, {"x": 3.0})


def test_the_first_warning_of_a_rule_is_logged_and_every_one_is_counted_and_noted(
    logged: pytest.LogCaptureFixture,
) -> None:
    monitor = HealthMonitor([Threshold(), OtherThreshold()])
    assert monitor.metrics == {} and monitor.take_note() is None
    monitor.check(Moment.after_step, 1, {"x": 1.5})
    assert lines_of(logged) == [("WARNING", "x is 1.5"), ("WARNING", "x is 1.5")]  # of two rules
    assert [vars(record)["data"]["rule"] for record in logged.records] == ["threshold", "other_threshold"]
    assert monitor.take_note() == "x is 1.5; x is 1.5" and monitor.take_note() is None
    monitor.check(Moment.after_step, 2, {"x": 1.25})
    assert len(logged.records) == 2 and monitor.take_note() == "x is 1.25; x is 1.25"
    assert monitor.metrics == {WARNINGS: 4.0}
    monitor.log_counts()
    assert lines_of(logged)[2:] == [
        ("INFO", f"health: {rule} warned 2 times; the notes of metrics.jsonl have every one")
        for rule in ("threshold", "other_threshold")
    ]


def test_information_is_logged_and_not_counted(logged: pytest.LogCaptureFixture) -> None:
    monitor = HealthMonitor([FirstValues()])
    monitor.check(Moment.after_step, 1, {EXPLAINED_VARIANCE: 0.5})
    assert (
        [level for level, _ in lines_of(logged)] == ["INFO"] and monitor.metrics == {} and monitor.take_note() is None
    )


def test_states_and_counts_go_through_a_checkpoint_and_a_new_rule_starts_from_the_beginning(
    logged: pytest.LogCaptureFixture,
) -> None:
    guard, threshold = MismatchGuard([MEAN], patience=3), Threshold()
    monitor = HealthMonitor([guard, threshold])
    metrics = {MEAN.metric: 0.2, "x": 1.5}
    monitor.check(Moment.before_training, 1, metrics)
    monitor.check(Moment.after_step, 1, metrics)
    state = json.loads(json.dumps(monitor.state_dict()))
    assert state == {
        "checks": {"mismatch": {"steps_beyond": 1}, "threshold": {"num_steps": 1}},
        "warnings": {"mismatch": 1, "threshold": 1},
    }
    guard, threshold, new = MismatchGuard([MEAN], patience=3), Threshold(), OtherThreshold()
    resumed = HealthMonitor([guard, threshold, new, FirstValues()])
    resumed.load_state_dict(state)
    assert (guard.steps_beyond, threshold.num_steps, new.num_steps) == (1, 1, 0)
    assert resumed.metrics == {WARNINGS: 2.0}
    logged.clear()
    resumed.check(Moment.before_training, 2, metrics)
    assert logged.messages == [
        "generator against trainer: rollout/log_prob_diff_mean 0.2 exceeds rollout.mismatch.max_log_prob_diff_mean (0.1); step 2 in a row of 3"
    ]


def test_rules_have_names_of_their_own() -> None:
    assert len({kind.rule for kind in CHECKS}) == len(CHECKS)

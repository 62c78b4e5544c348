"""Run the health checks of a run and log what they find."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hetero_ppo.health.check import Finding, HealthCheck, Moment, Severity, run_checks
from hetero_ppo.observability.logs import ONCE

log = logging.getLogger(__name__)

#: Metric with the number of warnings of all checks since the run began. It appears with the first one.
WARNINGS = "health/warnings"


class HealthMonitor:
    """Runs the checks of a run. A rule's first warning is logged; later ones are counted, and logged only at the debug level.

    The record of a step has all its warnings (``take_note``).
    """

    def __init__(self, checks: Sequence[HealthCheck]) -> None:
        """Take the checks.

        Args:
            checks: Checks of the run, each rule once.
        """
        self._checks = checks
        self._warnings: Counter[str] = Counter()  # rule -> number of warnings since the run began
        self._logged: set[str] = set()  # rules whose warning this process has logged
        self._notes: list[str] = []  # warnings of the current step

    def check(self, moment: Moment, step: int, metrics: Mapping[str, float]) -> None:
        """Run the checks of one moment on a step.

        Args:
            moment: Point of the step that has been reached.
            step: Step, counted from 1.
            metrics: Metrics of the step so far, the same on every rank.

        Raises:
            RunError: A check demands the end of the run.
        """
        for finding in run_checks([check for check in self._checks if check.moment is moment], step, metrics):
            self._report(finding)

    def _report(self, finding: Finding) -> None:
        extra = {**ONCE, "data": {"rule": finding.rule, "step": finding.step, "values": dict(finding.values)}}
        if finding.severity is Severity.info:
            log.info(finding.message, extra=extra)
            return
        self._warnings[finding.rule] += 1
        self._notes.append(finding.message)
        log.log(logging.DEBUG if finding.rule in self._logged else logging.WARNING, finding.message, extra=extra)
        self._logged.add(finding.rule)

    def take_note(self) -> str | None:
        """Return the warnings of the step for its record, and forget them; None if there are none."""
        note, self._notes = "; ".join(self._notes) or None, []
        return note

    @property
    def metrics(self) -> dict[str, float]:
        """Number of warnings since the run began; empty without any."""
        total = self._warnings.total()
        return {WARNINGS: float(total)} if total else {}

    def log_counts(self) -> None:
        """Log how often each rule has warned, for rules that warned more than once: only their first warning was logged."""
        for rule, count in self._warnings.items():
            if count > 1:
                log.info(f"health: {rule} warned {count} times; the notes of metrics.jsonl have every one")

    def state_dict(self) -> dict[str, Any]:
        """Return the checks' states and the counts, for a checkpoint."""
        return {"checks": {check.rule: check.state_dict() for check in self._checks}, "warnings": dict(self._warnings)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint. A check that the checkpoint does not have starts new.

        Args:
            state: Result of ``state_dict``.
        """
        for check in self._checks:
            if check.rule in state["checks"]:
                check.load_state_dict(state["checks"][check.rule])
        self._warnings = Counter(state["warnings"])

"""Interface of a health check, and the record of what it finds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Self

from hetero_ppo.config.schema import PpoConfig
from hetero_ppo.errors import RunError


class Severity(Enum):
    """Consequence of a finding."""

    info = "info"  # worth a line, nothing is wrong
    warning = "warning"  # something is wrong; the run continues
    stop = "stop"  # the run must end


class Moment(Enum):
    """Time at which a check runs, which decides the metrics that it reads."""

    before_training = "before_training"  # metrics of the experience; a stop prevents training on the step
    after_step = "after_step"  # all metrics of the step


@dataclass(frozen=True)
class Finding:
    """One finding of a check in one step."""

    rule: str  # name of the check
    severity: Severity
    message: str  # problem, place and advice
    step: int  # counted from 1
    values: Mapping[str, float] = field(default_factory=dict)  # metrics that the finding is based on


class HealthCheck(ABC):
    """A check that examines steps by their metrics.

    Metrics are the same on every rank, so all ranks find the same. A check computes nothing on the device and calls no collective.
    """

    #: Name of the check in findings, in the log, and in checkpoints.
    rule: ClassVar[str]
    moment: ClassVar[Moment]

    @classmethod
    @abstractmethod
    def for_run(cls, config: PpoConfig) -> Self | None:
        """Build the check of a run.

        Args:
            config: Checked configuration of the run.

        Returns:
            The check; None if the configuration leaves it nothing to check.
        """

    @abstractmethod
    def check(self, step: int, metrics: Mapping[str, float]) -> Finding | None:
        """Check one step. It is called once per step, in order.

        Args:
            step: Step, counted from 1.
            metrics: Metrics of the step so far (``moment``).

        Returns:
            A finding that is worth a line, a warning or the end of the run; None otherwise.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON. It is empty for a check without memory."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint.

        Args:
            state: Result of ``state_dict``.
        """
        assert not state, f"{self.rule} has a state and does not load it"


def run_checks(checks: Sequence[HealthCheck], step: int, metrics: Mapping[str, float]) -> list[Finding]:
    """Run every check on one step, and return the findings.

    Args:
        checks: Checks of one moment.
        step: Step, counted from 1.
        metrics: Metrics of the step, the same on every rank.

    Raises:
        RunError: A check demands the end of the run. The message has the texts of all checks that do.
    """
    findings = [found for check in checks if (found := check.check(step, metrics)) is not None]
    fatal = [finding.message for finding in findings if finding.severity is Severity.stop]
    if fatal:
        raise RunError("\n".join(fatal))
    return findings

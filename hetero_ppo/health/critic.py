"""Check of a critic before its first update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

from hetero_ppo.config.schema import PpoConfig
from hetero_ppo.health.check import Finding, HealthCheck, Moment, Severity

#: Share of the returns' variance that the values explain; NaN if all returns are equal.
EXPLAINED_VARIANCE = "critic/vf_explained_var"


class FirstValues(HealthCheck):
    """Check of the critic's values in step 1, before any update."""

    rule = "first_values"
    moment = Moment.after_step

    @classmethod
    def for_run(cls, config: PpoConfig) -> Self | None:
        """Build the check; None without a critic."""
        return None if config.critic is None else cls()

    def check(self, step: int, metrics: Mapping[str, float]) -> Finding | None:
        """Describe the values of step 1, and warn if they are worse than no values."""
        if step != 1:
            return None
        explained_variance = metrics[EXPLAINED_VARIANCE]
        severity = Severity.warning if explained_variance < 0 else Severity.info
        message = describe_first_values(explained_variance)
        return Finding(self.rule, severity, message, step, {EXPLAINED_VARIANCE: explained_variance})


def describe_first_values(explained_variance: float) -> str:
    """Return a line about the critic's values in step 1.

    Args:
        explained_variance: ``critic/vf_explained_var`` of step 1; NaN if all returns are equal.
    """
    if math.isnan(explained_variance):
        return "critic: all returns of step 1 are equal, so its values cannot be rated"
    line = f"critic: its values explain {explained_variance:.3g} of the variance of step 1's returns"
    if explained_variance >= 0:
        return f"{line} (0: as good as their mean; 1: all of it)"
    return (
        f"{line}: advantages are noisier than with no critic at all until it has learned. Start its head at zero "
        "(critic.model.head_init=zero, with a critic.model.path without a score head), train it alone for some steps "
        "(algorithm.critic_warmup_steps), or bring the rewards to the scale of its checkpoint's scores (reward.normalise, reward.clip)"
    )

"""The list of all health checks."""

from __future__ import annotations

from hetero_ppo.config.schema import PpoConfig
from hetero_ppo.health.check import HealthCheck
from hetero_ppo.health.critic import FirstValues
from hetero_ppo.health.mismatch import MismatchGuard

CHECKS: tuple[type[HealthCheck], ...] = (MismatchGuard, FirstValues)


def build_checks(config: PpoConfig) -> list[HealthCheck]:
    """Build the checks of a run.

    Args:
        config: Checked configuration of the run.
    """
    return [check for kind in CHECKS if (check := kind.for_run(config)) is not None]

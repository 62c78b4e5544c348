"""Warn when a long run saves nothing before its end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from hetero_ppo.observability.logs import ONCE

log = logging.getLogger(__name__)

#: Number of steps from which a run counts as long before any step was measured.
LONG_RUN_STEPS = 200
#: Estimated seconds, by the mean of the steps after the first, from which a run counts as long.
LONG_RUN_S = 1800.0
#: Number of steps that are measured before a run's length is estimated. The first step is not counted: it builds and compiles.
MEASURED_STEPS = 3
#: Seconds of work between two checkpoints that the warning proposes.
PROPOSED_S = 600.0


class UnsavedWork:
    """Warning for a long run whose ``checkpoint.every`` is 0: at the start by its number of steps, later by their measured time. It is given once."""

    def __init__(self, every: int, total_steps: int, now: Callable[[], float] = time.monotonic) -> None:
        """Take the run's settings.

        Args:
            every: ``checkpoint.every`` in steps; 0: one checkpoint, at the end.
            total_steps: Step at which the run ends.
            now: Clock, in seconds.
        """
        self._total_steps, self._now = total_steps, now
        self._is_done = every > 0
        self._first: tuple[int, float] | None = None  # (step, time of its end) of the first step seen

    def start(self, step: int) -> None:
        """Check the number of steps that are left when the run begins or continues at ``step``."""
        left = self._total_steps - step
        if not self._is_done and left >= LONG_RUN_STEPS:
            self._warn(f"{left} steps", f"about {max(1, left // 20)}")

    def step_done(self, step: int) -> None:
        """Check the measured time of the steps."""
        if self._is_done:
            return
        if self._first is None:
            self._first = (step, self._now())
            return
        first_step, since = self._first
        if step - first_step < MEASURED_STEPS:
            return
        step_s = (self._now() - since) / (step - first_step)
        left = self._total_steps - step
        if left * step_s >= LONG_RUN_S:
            proposed = max(1, round(PROPOSED_S / step_s))
            self._warn(
                f"about {left * step_s / 3600:.1f} h ({left} steps of {step_s:.3g} s)",
                f"{proposed}, one in about 10 minutes,",
            )
        elif step - first_step >= 2 * MEASURED_STEPS:
            self._is_done = True  # the run is short

    def _warn(self, length: str, proposed: str) -> None:
        self._is_done = True
        log.warning(
            f"checkpoint.every is 0 and the run has {length} to go: its only checkpoint is that of its end, and a run that is killed "
            f"or fails before loses everything. Set checkpoint.every ({proposed} would do); SIGTERM stops a run with a checkpoint",
            extra=ONCE,
        )

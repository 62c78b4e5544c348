"""Stops a run whose generator and trainer no longer agree on log-probs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from hetero_ppo.config.devices import dtype_of
from hetero_ppo.config.schema import Dtype, OldLogProbs, PpoConfig
from hetero_ppo.health.check import Finding, HealthCheck, Moment, Severity

#: Mean |difference| in log-prob. fp32: rounding makes about 1e-7 of it, so 1e-3 is no rounding. bf16 has 8 bits of mantissa, and the
#: two sides round at different places: after a weight sync one token may be off by 0.15, but not all of them by 0.1.
LOG_PROB_DIFF_MEAN = {Dtype.fp32: 1e-3, Dtype.bf16: 0.1}
#: Share of tokens whose ratio leaves 0.99..1.01. In bf16 rounding alone may take most tokens there: no bound, the mean decides.
RATIO_OUTSIDE_SHARE = {Dtype.fp32: 0.01, Dtype.bf16: 1.0}


#: Metrics that the error shows.
FIGURES = (
    "rollout/log_prob_diff_mean",
    "rollout/log_prob_diff_max",
    "rollout/ratio_outside_share",
    "rollout/mismatch_kl",
)


@dataclass(frozen=True)
class Bound:
    """The largest value that a metric may have."""

    metric: str
    field: str
    limit: float


def mismatch_bounds(config: PpoConfig) -> list[Bound]:
    """Return the bounds of a run: those of the config; where it leaves them to the dtype, those of the coarser of generator and actor.

    None are derived where a difference is not the generator's fault: log-probs of recorded rollouts are of whatever weights made
    them, and with top-p or top-k the generator's are of the truncated distribution, the trainer's of the whole one. None hold at
    all where old log-probs are the generator's own.
    """
    if config.algorithm.old_log_probs is OldLogProbs.rollout:
        return []
    sampling, mismatch = config.rollout.sampling, config.rollout.mismatch
    comparable = config.train.replay_rollouts is None and sampling.top_p == 1 and sampling.top_k == -1
    actor = dtype_of(config.actor.model)
    dtypes = {actor, config.rollout.dtype or actor}
    dtype = Dtype.bf16 if Dtype.bf16 in dtypes else Dtype.fp32
    bounds = []
    for metric, field, given, derived in (
        ("rollout/log_prob_diff_mean", "max_log_prob_diff_mean", mismatch.max_log_prob_diff_mean, LOG_PROB_DIFF_MEAN),
        (
            "rollout/ratio_outside_share",
            "max_ratio_outside_share",
            mismatch.max_ratio_outside_share,
            RATIO_OUTSIDE_SHARE,
        ),
    ):
        if given is not None or comparable:
            bounds.append(Bound(metric, f"rollout.mismatch.{field}", derived[dtype] if given is None else given))
    return bounds


class MismatchGuard(HealthCheck):
    """Counts steps in a row that are beyond a bound, and stops the run at the last one that it is patient with."""

    rule = "mismatch"
    moment = Moment.before_training

    def __init__(self, bounds: list[Bound], patience: int) -> None:
        """Take the bounds.

        Args:
            bounds: Bounds of a step; one broken bound is enough.
            patience: Steps in a row beyond a bound at which the run stops.
        """
        self.bounds = bounds
        self.patience = patience
        self.steps_beyond = 0

    @classmethod
    def for_run(cls, config: PpoConfig) -> Self | None:
        """Build the check; None without bounds."""
        bounds = mismatch_bounds(config)
        return cls(bounds, config.rollout.mismatch.patience) if bounds else None

    def state_dict(self) -> dict[str, Any]:
        """Return the count, for a checkpoint."""
        return {"steps_beyond": self.steps_beyond}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the count of a checkpoint."""
        self.steps_beyond = int(state["steps_beyond"])

    def check(self, step: int, metrics: Mapping[str, float]) -> Finding | None:
        """Compare the step with the bounds. A NaN is beyond every bound."""
        broken = [bound for bound in self.bounds if not metrics[bound.metric] <= bound.limit]
        self.steps_beyond = self.steps_beyond + 1 if broken else 0
        if not broken:
            return None
        reasons = ", ".join(f"{b.metric} {metrics[b.metric]:.3g} exceeds {b.field} ({b.limit:g})" for b in broken)
        values = {name: value for name, value in metrics.items() if name in FIGURES}
        if self.steps_beyond < self.patience:
            message = f"engine against trainer: {reasons}; step {self.steps_beyond} in a row of {self.patience}"
            return Finding(self.rule, Severity.warning, message, step, values)
        return Finding(self.rule, Severity.stop, self._describe_stop(step, reasons, values), step, values)

    def _describe_stop(self, step: int, reasons: str, values: Mapping[str, float]) -> str:
        figures = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        return (
            f"step {step}: the generator's log-probs are not the trainer's: {reasons}, for {self.steps_beyond} step(s) in a row "
            f"(rollout.mismatch.patience {self.patience}).\nThis step: {figures}. It was not trained on.\nWhere it began "
            "at one step, look for weights that did not arrive; where it grew, for a model that has become very sure or very "
            "unsure of its tokens; where it was there from the start, give engine and actor one dtype (rollout.dtype, "
            "actor.model.dtype; fp32 is closest). A mismatch that has to be lived with is corrected for by "
            "algorithm.rollout_correction.kind=truncated, and the bound raised."
        )

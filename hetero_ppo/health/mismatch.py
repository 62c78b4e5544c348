"""Check that stops a run when the generator and the trainer no longer agree on log-probs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from hetero_ppo.config.devices import dtype_of
from hetero_ppo.config.schema import Dtype, OldLogProbs, PpoConfig
from hetero_ppo.health.check import Finding, HealthCheck, Moment, Severity

#: Limits of the mean |difference| in log-prob. In fp32 rounding causes about 1e-7, so 1e-3 is not rounding. bf16 has 8 bits of mantissa and
#: the two sides round at different places: after a weight sync one token may differ by 0.15, but the mean not by 0.1.
LOG_PROB_DIFF_MEAN = {Dtype.fp32: 1e-3, Dtype.bf16: 0.1}
#: Limits of the share of tokens whose ratio leaves 0.99..1.01. In bf16 rounding alone may move most tokens there, so this share has no
#: bound and the mean decides.
RATIO_OUTSIDE_SHARE = {Dtype.fp32: 0.01, Dtype.bf16: 1.0}


#: Metrics that the error lists.
FIGURES = (
    "rollout/log_prob_diff_mean",
    "rollout/log_prob_diff_max",
    "rollout/ratio_outside_share",
    "rollout/mismatch_kl",
)


@dataclass(frozen=True)
class Bound:
    """The largest allowed value of one metric."""

    metric: str
    field: str  # option that sets the limit
    limit: float


def mismatch_bounds(config: PpoConfig) -> list[Bound]:
    """Return the bounds of a run: those that the config sets; the others follow from the coarser dtype of generator and actor.

    No bound follows from the dtype if a difference need not be the generator's fault. Log-probs of recorded rollouts come from other weights.
    With top-p or top-k the generator's log-probs belong to the truncated distribution, the trainer's to the whole one. If old log-probs are the
    generator's own, there are no bounds at all.
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
    """Check that counts consecutive steps beyond a bound, and stops the run when their number reaches its patience."""

    rule = "mismatch"
    moment = Moment.before_training

    def __init__(self, bounds: list[Bound], patience: int) -> None:
        """Take the bounds.

        Args:
            bounds: Bounds of a step; one broken bound is enough.
            patience: Number of consecutive steps beyond a bound at which the run stops.
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
        """Restore the count from a checkpoint."""
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
            message = f"generator against trainer: {reasons}; step {self.steps_beyond} in a row of {self.patience}"
            return Finding(self.rule, Severity.warning, message, step, values)
        return Finding(self.rule, Severity.stop, self._describe_stop(step, reasons, values), step, values)

    def _describe_stop(self, step: int, reasons: str, values: Mapping[str, float]) -> str:
        figures = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        return (
            f"step {step}: the generator's log-probs are not the trainer's: {reasons}, for {self.steps_beyond} step(s) in a row "
            f"(rollout.mismatch.patience {self.patience}).\nThis step: {figures}. It was not trained on.\nIf it began "
            "at one step, look for weights that did not arrive. If it grew, look for a model that has become very sure or very "
            "unsure of its tokens. If it was there from the start, give generator and actor one dtype (rollout.dtype, "
            "actor.model.dtype; fp32 is closest). If you cannot avoid the mismatch, correct for it with "
            "algorithm.rollout_correction.kind=truncated, and raise the bound."
        )

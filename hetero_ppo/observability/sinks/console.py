"""Console sink: one aligned line of headline metrics."""

from __future__ import annotations

import logging
from typing import Self

from hetero_ppo.observability.sinks.base import MetricsSink, SinkSettings, non_finite
from hetero_ppo.observability.timers import TOTAL
from hetero_ppo.types import StepMetrics

log = logging.getLogger(__name__)

#: Metrics of the console line, in order: name, label, format. A line has those that its record has, so one table serves SFT, reward
#: models, PPO, and their evaluations. All other metrics are in the files.
HEADLINES: tuple[tuple[str, str, str], ...] = (
    ("train/loss", "loss", "8.4f"),
    ("rm/accuracy", "acc", "6.3f"),
    ("rm/score_margin", "margin", "7.3f"),
    ("train/grad_norm", "grad", "7.3f"),
    ("train/lr", "lr", "8.2e"),
    ("reward/mean", "reward", "7.3f"),
    ("kl/reference", "kl", "7.3f"),
    ("response_length/mean", "len", "6.1f"),
    ("actor/pg_loss", "pg", "8.4f"),
    ("actor/ppo_kl", "ppo_kl", "8.5f"),
    ("actor/entropy", "ent", "6.3f"),
    ("actor/grad_norm", "a.grad", "7.3f"),
    ("critic/vf_loss", "vf", "8.4f"),
    ("critic/vf_explained_var", "ev", "6.3f"),
    ("eval/loss", "eval loss", "7.4f"),
    ("eval/accuracy", "eval acc", "6.3f"),
    ("eval/score_margin", "eval margin", "7.3f"),
    ("eval/greedy_accuracy", "eval greedy", "6.3f"),
    ("eval/reward", "eval reward", "7.3f"),
    ("eval/kl", "eval kl", "7.3f"),
    ("eval/response_length", "eval len", "6.1f"),
)


class ConsoleSink(MetricsSink):
    """Sink that logs a record every ``run.log_every`` steps.

    It also logs the first and the last step, and every record with an evaluation or with a value that is not finite.
    """

    def __init__(self, log_every: int, total_steps: int | None) -> None:
        """Take the interval.

        Args:
            log_every: Steps between two lines.
            total_steps: Steps of the run; None: unknown.
        """
        self._log_every = log_every
        self._total_steps = total_steps

    @classmethod
    def open(cls, settings: SinkSettings) -> Self:
        """Take the interval of the run."""
        return cls(max(1, settings.config.log_every), settings.total_steps)

    def write(self, record: StepMetrics) -> None:
        """Log the record if it is due."""
        if self._is_due(record):
            log.info(console_line(record, self._total_steps), extra={"data": {"step": record.step}})

    def _is_due(self, record: StepMetrics) -> bool:
        return (
            record.step % self._log_every == 0
            or record.step in (1, self._total_steps)
            or any(name.startswith("eval/") for name in record.values)
            or bool(non_finite(record.values))
        )


def console_line(record: StepMetrics, total_steps: int | None = None) -> str:
    """Return one aligned line of the headline metrics that the record has; without any of them, its first six metrics.

    Args:
        record: Metrics of a step.
        total_steps: Steps of the run; None: unknown.
    """
    shown = [f"{label} {record.values[name]:{spec}}" for name, label, spec in HEADLINES if name in record.values] or [
        f"{name} {value:.4g}" for name, value in list(record.values.items())[:6]
    ]
    step = f"{record.step}" if total_steps is None else f"{record.step:>{len(str(total_steps))}}/{total_steps}"
    parts = [f"step {step:>5}", *shown]
    if TOTAL in record.seconds:
        parts.append(f"{record.seconds[TOTAL]:6.2f} s")
    bad = non_finite(record.values)
    if bad:
        parts.append("NOT FINITE: " + ", ".join(f"{name} = {text}" for name, text in bad.items()))
    return " | ".join(parts)

"""The state of a PPO trainer in a checkpoint, besides the trained roles."""

from __future__ import annotations

from typing import Any

from hetero_ppo.experience.stages import ExperienceMaker
from hetero_ppo.health.mismatch import MismatchGuard
from hetero_ppo.health.monitor import HealthMonitor
from hetero_ppo.trainers.ppo_data import PpoData
from hetero_ppo.trainers.run import Run
from hetero_ppo.trainers.samplers import load_sampler

#: Entries that ``load_trainer_state`` needs. ``health`` is missing in checkpoints of older versions.
STATE_NAMES = ("prompts", "kl_controller", "score_moments", "waiting")


def trainer_state(data: PpoData, maker: ExperienceMaker, health: HealthMonitor) -> dict[str, Any]:
    """Return the state as JSON."""
    return {
        "prompts": data.sampler.state_dict(),
        "kl_controller": maker.kl_controller.state_dict(),
        "score_moments": maker.score_moments.state_dict(),
        "waiting": data.waiting.state_dict(),
        "health": health.state_dict(),
        "template_sha256": data.encoder.template_hash,
    }


def load_trainer_state(
    state: dict[str, Any], data: PpoData, maker: ExperienceMaker, health: HealthMonitor, run: Run
) -> None:
    """Put the state of a checkpoint back. A KL coefficient or controller that the configuration has changed stays as configured.

    Args:
        state: State that ``trainer_state`` returned.
        data: Prompts of the run.
        maker: Maker of experiences, with the KL controller and the moments of the scores.
        health: Monitor of the health checks.
        run: Run, which knows the options that have changed since the checkpoint.

    Raises:
        ValueError: Prompts of the checkpoint wait for a response, and there is no over-sampling to give them one; or the checkpoint is
            of other data.
    """
    data.waiting.load_state_dict(state["waiting"])
    load_sampler(data.sampler, state["prompts"], run)
    if not (run.has_changed("algorithm.kl.coef") or run.has_changed("algorithm.kl.controller")):
        maker.kl_controller.load_state_dict(state["kl_controller"])
    maker.score_moments.load_state_dict(state["score_moments"])
    health.load_state_dict(state["health"] if "health" in state else _health_of_older_version(state))


def _health_of_older_version(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of the health checks in a checkpoint that was written before they had one."""
    return {"checks": {MismatchGuard.rule: state["mismatch_guard"]}, "warnings": {}}

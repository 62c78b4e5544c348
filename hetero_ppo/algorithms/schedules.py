"""Learning-rate schedules."""

from __future__ import annotations

import math

from hetero_ppo.config.schema import LrSchedule, OptimizerConfig


def lr_at(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Return the learning rate of one optimizer step.

    Warm-up is linear, ``lr * (step + 1) / (warmup_steps + 1)``, so that the first step moves the weights and step
    ``warmup_steps`` is the first with the full rate. After it the rate is constant, or falls linearly or along half a
    cosine (Loshchilov and Hutter 2017, equation 5, without restarts) so as to reach ``min_lr`` where step
    ``total_steps`` would be: the last step is not wasted on a rate of 0. Beyond ``total_steps`` it stays at ``min_lr``.

    Args:
        step: Number of optimizer steps taken before this one, from 0.
        config: Section of the optimizer, of which lr, min_lr, lr_schedule and warmup_steps are read.
        total_steps: Number of optimizer steps of the whole run, warm-up included.

    Returns:
        The learning rate itself, not a multiplier.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.lr_schedule == LrSchedule.constant:
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    if config.lr_schedule == LrSchedule.linear:
        remaining = 1.0 - progress
    elif config.lr_schedule == LrSchedule.cosine:
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        raise ValueError(f"optimizer.lr_schedule is {config.lr_schedule!r}: set it to constant, linear or cosine")
    return config.min_lr + (config.lr - config.min_lr) * remaining

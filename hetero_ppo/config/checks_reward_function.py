"""Rules of how reward.function and train.eval_function are called."""

from __future__ import annotations

from hetero_ppo.config.require import require
from hetero_ppo.config.schema import PpoConfig


def check_function_calls(config: PpoConfig, world_size: int) -> None:
    reward, train = config.reward, config.train
    functions = {"reward.function": reward.function, "train.eval_function": train.eval_function}
    for field, value, users in (
        ("reward.workers", reward.workers, tuple(functions)),
        ("reward.concurrency", reward.concurrency, tuple(functions)),
        ("reward.batch", reward.batch, ("reward.function",)),
        ("train.eval_batch", train.eval_batch, ("train.eval_function",)),
    ):
        is_used = any(functions[name] is not None for name in users)
        fix = f"{' or '.join(users)} is not set, so it would not be used; leave it out"
        require(value is None or is_used, field, value, fix)

"""Rules of reward.function and train.eval_function: their names, and how they are called."""

from __future__ import annotations

from hetero_ppo.config.require import require
from hetero_ppo.config.schema import PpoTrainConfig, RewardConfig


def check_function_names(reward: RewardConfig, train: PpoTrainConfig, *, has_eval: bool) -> None:
    """Raise for a function whose name has another form than module and function, or that has nothing to evaluate.

    Args:
        reward: Section of the rewards.
        train: Section of length and evaluation.
        has_eval: Whether there are held-out prompts.
    """
    for field, name in (("reward.function", reward.function), ("train.eval_function", train.eval_function)):
        module, colon, function = (name or "module:function").rpartition(":")
        require(
            bool(colon and module and function.isidentifier()),
            field,
            name,
            "a function is named package.module:function or path/to/file.py:function",
        )
    require(
        train.eval_function is None or has_eval,
        "train.eval_function",
        train.eval_function,
        "there is nothing to evaluate on; set data.eval to a file of prompts",
    )


def check_function_calls(reward: RewardConfig, train: PpoTrainConfig) -> None:
    """Raise for an option of calls that no function of the run uses."""
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

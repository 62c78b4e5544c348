"""The rows of every step: which ones a run takes, and how it goes on with those after a checkpoint."""

from __future__ import annotations

from typing import Any

from hetero_ppo.data.dataset import Dataset
from hetero_ppo.data.sampler import ResumableSampler
from hetero_ppo.trainers.run import Run


def make_sampler(dataset: Dataset[Any], global_batch_size: int, *, seed: int, shuffle: bool) -> ResumableSampler:
    """Build the sampler of a run. Every rank holds whole batches, and each role takes its rows of them.

    Args:
        dataset: Training data.
        global_batch_size: Number of rows of a step, over all ranks.
        seed: Seed of the order.
        shuffle: Whether every epoch has an order of its own.
    """
    return ResumableSampler(
        len(dataset),
        global_batch_size,
        dp_rank=0,
        dp_size=1,
        seed=seed,
        shuffle=shuffle,
        fingerprint=dataset.fingerprint,
    )


def load_sampler(sampler: ResumableSampler, state: dict[str, Any], run: Run) -> None:
    """Go on with the rows after those of a checkpoint.

    Args:
        sampler: Sampler of the run.
        state: State of the checkpoint's sampler.
        run: Run, which knows the changes that ``checkpoint.allow_changes`` allows.

    Raises:
        ValueError: The rows are of other data, or in another order, and that is not allowed.
    """
    allowed = [] if run.resume is None else run.resume.allowed
    sampler.load_state_dict(state, allowed=allowed, is_data_allowed=run.allows("data.train"))

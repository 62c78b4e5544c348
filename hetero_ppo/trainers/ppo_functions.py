"""The Python functions of a PPO run: reward.function and train.eval_function, in their worker processes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from hetero_ppo.config.schema import PpoTrainConfig, RewardConfig
from hetero_ppo.data.chat_template import TextEncoder
from hetero_ppo.reward.function import FunctionReward
from hetero_ppo.trainers.run import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PpoFunctions:
    """The functions that a run has; None where the config names none."""

    reward: FunctionReward | None
    evaluation: FunctionReward | None

    def check(self, run: Run) -> None:
        """Wait until the functions are imported, and print how they are called. Collective over the world.

        Raises:
            ValueError: One cannot be imported or called; names the config field, file and line.
        """
        for function in self._all:
            function.check()
            if run.is_writer:  # the workers are on its rank
                log.info(function.describe())

    @property
    def _all(self) -> list[FunctionReward]:
        return [function for function in (self.reward, self.evaluation) if function is not None]


@contextlib.contextmanager
def open_functions(
    reward: RewardConfig, train: PpoTrainConfig, run: Run, encoder: TextEncoder
) -> Iterator[PpoFunctions]:
    """Start a worker of each function on rank 0, and end all workers with the block.

    The workers import the modules of the functions while the run goes on to load.

    Args:
        reward: The ``reward`` section, whose limits of time and workers hold for both functions.
        train: The ``train`` section, for the function of the evaluation.
        run: Run of this process.
        encoder: Encoder of the prompts, which makes the texts that the functions read.
    """
    function = partial(
        FunctionReward,
        decode=encoder.decode,
        timeout_s=reward.timeout_s,
        workers=reward.workers,
        concurrency=reward.concurrency,
        progress=run.watchdog.progress,
        world=run.world,
    )
    functions = PpoFunctions(
        None if reward.function is None else function(reward.function, on_error=reward.on_error, batch=reward.batch),
        None
        if train.eval_function is None
        else function(train.eval_function, field="train.eval_function", batch=train.eval_batch),
    )
    with contextlib.ExitStack() as stack:
        for each in functions._all:
            stack.enter_context(contextlib.closing(each)).open()
        yield functions

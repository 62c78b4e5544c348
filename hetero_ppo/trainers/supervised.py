"""What SFT and reward-model training share: the loop over batches, evaluation, checkpoints, export."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import megatron_bridge.platform as platform
from hetero_ppo.algorithms.losses import mean_metrics
from hetero_ppo.checkpoint.manager import CheckpointManager
from hetero_ppo.config.schema import CheckpointConfig, RunConfig, SupervisedTrainConfig
from hetero_ppo.data.sampler import ResumableSampler
from hetero_ppo.engines.train_engine import TrainEngine, TrainStepResult
from hetero_ppo.observability.metrics import MetricsLogger
from hetero_ppo.observability.progress import progress
from hetero_ppo.observability.timers import PhaseTimer
from hetero_ppo.trainers.run import Run
from hetero_ppo.types import StepMetrics


class SupervisedTrainer(ABC):
    """Trains one role on a fixed data set.

    A subclass loads the data before it builds the engine, so that bad data is said before a model is loaded.
    """

    role: str

    def __init__(
        self, run: Run, run_config: RunConfig, train: SupervisedTrainConfig, checkpoint: CheckpointConfig, num_rows: int
    ) -> None:
        """Args:
        run: of this process.
        run_config: seed, logging.
        train: batching and length.
        checkpoint: when to save, what to load.
        num_rows: examples (or pairs) of the training data.
        """
        self.run = run
        self.run_config = run_config
        self.train = train
        self.checkpoint = checkpoint
        self.sampler = ResumableSampler(
            num_rows, train.global_batch_size, dp_rank=0, dp_size=1, seed=run_config.seed, shuffle=self.shuffle
        )
        steps_per_epoch = -(-num_rows // train.global_batch_size)
        self.total_steps = train.steps if train.steps is not None else train.epochs * steps_per_epoch
        if self.total_steps <= 0:
            raise ValueError(f"train.steps {train.steps}, train.epochs {train.epochs}: the run would do zero steps")
        run.say(
            f"{num_rows} training rows, {train.global_batch_size} per step over {run.world_size} rank(s), "
            f"{self.total_steps} steps = {self.total_steps * train.global_batch_size / num_rows:.2f} epochs"
        )

    #: False keeps the file's order.
    shuffle: bool = True

    @property
    @abstractmethod
    def engine(self) -> TrainEngine: ...

    @abstractmethod
    def step(self, rows: list[int]) -> TrainStepResult:
        """One optimizer step on the rows of the training data."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Metrics on the held-out data; empty without any."""

    def fit(self) -> None:
        """Train, evaluate, save, export."""
        manager = CheckpointManager(self.run.dir, self.checkpoint.keep)
        start = self._resume(manager)
        if start >= self.total_steps:
            raise ValueError(f"checkpoint.load is at step {start} of {self.total_steps}: zero steps are left to do")
        timer = PhaseTimer(platform.synchronize)
        with MetricsLogger(
            self.run.dir, self.run_config, is_writer=self.run.is_writer, total_steps=self.total_steps
        ) as logger:
            with progress(range(start, self.total_steps), description=f"{self.role} training") as steps:
                for step in steps:
                    with timer.phase("train"):
                        result = self.step(self.sampler.next_batch())
                    values = self._train_metrics(result)
                    last = step + 1 == self.total_steps
                    if last or (self.train.eval_every and (step + 1) % self.train.eval_every == 0):
                        with timer.phase("eval"):
                            values.update(self.evaluate())
                    logger.log(StepMetrics(step + 1, values, timer.collect()))
                    if last or (self.checkpoint.every and (step + 1) % self.checkpoint.every == 0):
                        manager.save(step + 1, {self.role: self.engine}, {"sampler": self.sampler.state_dict()})
        if self.checkpoint.export_hf:
            self.engine.export(str(self.run.dir / "hf"))
            self.run.say(f"exported to {self.run.dir / 'hf'}")

    def _resume(self, manager: CheckpointManager) -> int:
        if self.checkpoint.load is None:
            return 0
        state: dict[str, Any] = manager.load(Path(self.checkpoint.load), {self.role: self.engine})
        self.sampler.load_state_dict(state["sampler"])
        self.run.say(f"resumed {self.role} from {self.checkpoint.load} at step {state['step']}")
        return int(state["step"])

    def _train_metrics(self, result: TrainStepResult) -> dict[str, float]:
        return {
            "train/loss": result.loss,
            "train/grad_norm": result.grad_norm,
            "train/lr": result.learning_rate,
            **mean_metrics(result.metric_sums),
        }


def describe_loaded(run: Run, role: str, engine: TrainEngine) -> None:
    """Name every tensor that was initialised rather than loaded."""
    report = engine.load_report
    run.say(f"{role}: {report.loaded} tensors loaded from {engine.config.model.path}")
    for name in report.initialised:
        run.say(f"{role}: {name} was INITIALISED (seed {engine.config.model.init_seed}), the checkpoint has none")

"""The part that SFT and reward-model training share: the loop over batches, evaluation, checkpoints, export."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from hetero_ppo.checkpoint.manager import CheckpointManager
from hetero_ppo.config.derived import SupervisedBatching
from hetero_ppo.config.schema import CheckpointConfig, RunConfig, SupervisedTrainConfig
from hetero_ppo.data.chat_template import TextEncoder
from hetero_ppo.data.export_files import export_files
from hetero_ppo.data.sampler import ResumableSampler
from hetero_ppo.engines.loss_terms import TrainStepResult, step_metrics
from hetero_ppo.engines.train_engine import TrainEngine
from hetero_ppo.observability.metrics import MetricsLogger
from hetero_ppo.observability.progress import progress
from hetero_ppo.observability.timers import PhaseTimer
from hetero_ppo.runtime.unsaved import UnsavedWork
from hetero_ppo.trainers.run import Run, first_step
from hetero_ppo.trainers.samplers import load_sampler
from hetero_ppo.types import StepMetrics
from megatron_bridge import platform

log = logging.getLogger(__name__)


class SupervisedTrainer(ABC):
    """Trains one role on a fixed dataset.

    A subclass loads the data before it builds the engine, so that an error in the data is raised before a model is loaded.

    Args:
        run: Run of this process.
        run_config: The ``run`` section.
        train: The ``train`` section.
        checkpoint: The ``checkpoint`` section.
        batching: Batch arithmetic of the run.
        sampler: Sampler of the training rows.
        engine: Trained role.
        encoder: Tokenizer and chat template of the run.
    """

    def __init__(
        self,
        run: Run,
        run_config: RunConfig,
        train: SupervisedTrainConfig,
        checkpoint: CheckpointConfig,
        batching: SupervisedBatching,
        sampler: ResumableSampler,
        engine: TrainEngine,
        encoder: TextEncoder,
    ) -> None:
        self.run = run
        self.run_config = run_config
        self.train = train
        self.checkpoint = checkpoint
        self.total_steps = batching.total_steps
        self.sampler = sampler
        self.engine = engine
        self.encoder = encoder

    @abstractmethod
    def step(self, rows: list[int]) -> TrainStepResult:
        """Take one optimizer step on these rows of the training data."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Return metrics on the held-out data; none without any."""

    def weight_files(self) -> dict[str, str]:
        """Return name -> text of the files that go with the present weights into a checkpoint and an export. Collective."""
        return {}

    def fit(self) -> None:
        """Train, evaluate, save, export."""
        manager = CheckpointManager(
            self.run.dir,
            self.checkpoint,
            self.run.world,
            timeout_s=60 * self.run_config.timeout_minutes,
            about=self.run.about,
        )
        manager.check_room({self.engine.role: self.engine})
        start = first_step(self.checkpoint, self.run.dir, self.total_steps)
        self._resume(manager)
        timer = PhaseTimer(platform.synchronize, watchdog=self.run.watchdog)
        unsaved = UnsavedWork(self.checkpoint.every, self.total_steps)
        unsaved.start(start)
        self.run.forget_later_steps(start)
        with (
            manager,
            MetricsLogger(
                self.run.dir,
                self.run_config,
                is_writer=self.run.is_writer,
                total_steps=self.total_steps,
                first_step=start + 1,
            ) as logger,
            progress(range(start, self.total_steps), description=f"{self.engine.role} training") as steps,
        ):
            for step in steps:
                with timer.phase("train"):
                    result = self.step(self.sampler.next_global_batch())
                values = self._train_metrics(result)
                if manager.is_saving:
                    with timer.phase("checkpoint"):
                        manager.finish(wait=False)
                last = step + 1 == self.total_steps
                if last or (self.train.eval_every and (step + 1) % self.train.eval_every == 0):
                    with timer.phase("eval"):
                        values.update(self.evaluate())
                logger.log(StepMetrics(step + 1, values, timer.collect()))
                unsaved.step_done(step + 1)
                stopping = self.run.should_stop(step + 1, self.total_steps)
                if last or stopping or (self.checkpoint.every and (step + 1) % self.checkpoint.every == 0):
                    state = {"sampler": self.sampler.state_dict(), "template_sha256": self.encoder.template_hash}
                    with timer.phase("checkpoint"):
                        role = {self.engine.role: self.engine}
                        manager.save(step + 1, role, state, values, self.weight_files(), wait=stopping or last)
                if stopping:
                    self.run.stopped(step + 1)
        if self.checkpoint.export_hf:
            more = export_files(self.encoder, self.engine.config.model.path, self.engine.model.head)
            files = {**more.files, **self.weight_files()}
            self.engine.model.export(str(self.run.dir / "hf"), files=files, config_changes=more.config)
            self.run.exported("", self.total_steps)

    def _resume(self, manager: CheckpointManager) -> None:
        if self.checkpoint.load is None:
            return
        state: dict[str, Any] = manager.load(Path(self.checkpoint.load), {self.engine.role: self.engine}, {"sampler"})
        load_sampler(self.sampler, state["sampler"], self.run)
        log.info(f"resumed {self.engine.role} from {self.checkpoint.load} at step {state['step']}")

    def _train_metrics(self, result: TrainStepResult) -> dict[str, float]:
        return {
            "train/loss": result.loss,
            "train/grad_norm": result.grad_norm,
            "train/lr": result.learning_rate,
            "train/skipped_steps": float(result.is_skipped),
            **step_metrics([result]),
        }

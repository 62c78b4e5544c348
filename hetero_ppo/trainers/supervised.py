"""What SFT and reward-model training share: the loop over batches, evaluation, checkpoints, export."""

from __future__ import annotations

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hetero_ppo.checkpoint.manager import CheckpointManager
from hetero_ppo.config.derived import SupervisedBatching
from hetero_ppo.config.schema import (
    CheckpointConfig,
    DataConfig,
    HeadInit,
    RoleConfig,
    RunConfig,
    SupervisedTrainConfig,
)
from hetero_ppo.data.chat_template import TextEncoder
from hetero_ppo.data.dataset import Dataset, Example
from hetero_ppo.data.export_files import export_files
from hetero_ppo.data.sampler import ResumableSampler
from hetero_ppo.engines.model_engine import ModelEngine, head_start
from hetero_ppo.engines.loss_terms import TrainStepResult, step_metrics
from hetero_ppo.engines.train_engine import TrainEngine
from hetero_ppo.observability.logs import ONCE
from hetero_ppo.observability.metrics import MetricsLogger
from hetero_ppo.observability.progress import progress
from hetero_ppo.observability.timers import PhaseTimer
from hetero_ppo.reward.self_check import build_proved
from hetero_ppo.runtime.unsaved import UnsavedWork
from hetero_ppo.trainers.run import Run, first_step
from hetero_ppo.types import StepMetrics
from megatron_bridge import platform

log = logging.getLogger(__name__)

E = TypeVar("E", bound=Example)
C = TypeVar("C", bound=RoleConfig)
RoleEngine = TypeVar("RoleEngine", bound=ModelEngine)


class SupervisedTrainer(ABC):
    """Trains one role on a fixed data set.

    A subclass loads the data before it builds the engine, so that bad data is said before a model is loaded.
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
        """Args:
        run: of this process.
        run_config: seed, logging.
        train: batching and length.
        checkpoint: when to save, what to load.
        batching: derived sizes.
        sampler: of the training rows, over all ranks.
        engine: the trained role.
        encoder: tokenizer and chat template of the run.
        """
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
        """One optimizer step on the rows of the training data."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Metrics on the held-out data; empty without any."""

    def weight_files(self) -> dict[str, str]:
        """Name -> text of what goes with the present weights, into a checkpoint and an export. Collective."""
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
            more = export_files(self.encoder, self.engine.config.model.path, self.engine.head)
            files = {**more.files, **self.weight_files()}
            self.engine.export(str(self.run.dir / "hf"), files=files, config_changes=more.config)
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


def make_sampler(
    dataset: Dataset[E], global_batch_size: int, run_config: RunConfig, data: DataConfig
) -> ResumableSampler:
    """Rows of every step, over all ranks: each rank holds whole batches and takes its rows in its layout."""
    return ResumableSampler(
        len(dataset),
        global_batch_size,
        dp_rank=0,
        dp_size=1,
        seed=run_config.seed,
        shuffle=data.shuffle,
        fingerprint=dataset.fingerprint,
    )


def load_sampler(sampler: ResumableSampler, state: dict[str, Any], run: Run) -> None:
    """Go on with the rows after those of a checkpoint, as far as ``checkpoint.allow_changes`` allows other ones.

    Raises:
        ValueError: They are of other data, or in another order.
    """
    allowed = [] if run.resume is None else run.resume.allowed
    sampler.load_state_dict(state, allowed=allowed, is_data_allowed=run.allows("data.train"))


def build_role(run: Run, name: str, config: C, build: Callable[[C], RoleEngine]) -> RoleEngine:
    """Build a role of a run, aligned where its configuration and the device say so, and print what was loaded. Collective.

    A run that goes on from a checkpoint computes a role as that run did where ``aligned`` is null in both, and prints it where it cannot.

    Args:
        run: Notes whether the role is aligned where that was left open, for its checkpoints.
        name: Of the role.
        config: Model and layout.
        build: Makes the engine of a configuration.

    Raises:
        RunError: the role was asked to be aligned, and its bits depend on the batch.
    """
    if config.aligned is not None:
        engine = build_proved(config, build)
        describe_loaded(engine)
        return engine
    before = None if run.resume is None else run.resume.aligned.get(name)
    engine = build_proved(config if before is not False else dataclasses.replace(config, aligned=False), build)
    describe_loaded(engine)
    run.aligned[name] = engine.bridge.aligned
    if before is False and run.resume is not None:
        engine.plain_because = "aligned is null, and it was plain in the run that the checkpoint is of"
        log.info(
            f"{name}: plain, as in the run of {run.resume.folder} ({name}.aligned is null): no golden scores; set it to true to be aligned"
        )
    elif before and run.resume is not None and not engine.bridge.aligned:
        log.warning(
            f"{name} was aligned in the run of {run.resume.folder} and is not any more ({name}.{engine.plain_because}): the bits of "
            "its outputs are other ones from here on",
            extra=ONCE,
        )
    elif before is None and run.resume is not None and engine.bridge.aligned and platform.HAS_CUDA:
        log.info(f"{name}: aligned from here on; {run.resume.folder} does not say whether it was")
    return engine


def describe_loaded(engine: ModelEngine) -> None:
    """Name every tensor that was initialised rather than loaded."""
    report = engine.load_report
    model = engine.config.model
    log.info(f"{engine.role}: {report.loaded} tensors loaded from {model.path}")
    for name in report.initialised:
        start, seed = head_start(model, engine.head)
        how = "at zero" if start is HeadInit.zero else f"at random, seed {seed}"
        log.info(f"{engine.role}: {name} was INITIALISED ({how}): the checkpoint has none")

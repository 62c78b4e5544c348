"""Proximal policy optimisation from reward models, a reward function, or both."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hetero_ppo.checkpoint.manager import CheckpointManager
from hetero_ppo.config.derived import PpoBatching, passes
from hetero_ppo.config.schema import PpoConfig
from hetero_ppo.data.export_files import export_files
from hetero_ppo.engines.loss_terms import LossFn, LossTerm, TrainStepResult, num_loss_tokens, step_metrics
from hetero_ppo.engines.losses import actor_loss_fn, critic_loss_fn
from hetero_ppo.engines.probe import probe_log_probs
from hetero_ppo.engines.shared_device import SharedDevice
from hetero_ppo.engines.train_engine import TrainEngine
from hetero_ppo.experience.bank import RolloutBank
from hetero_ppo.experience.pending_rollout import PendingRollout
from hetero_ppo.experience.pipeline import Pipeline
from hetero_ppo.experience.stages import ExperienceMaker
from hetero_ppo.health.check import Moment
from hetero_ppo.health.monitor import HealthMonitor
from hetero_ppo.observability.metrics import MetricsLogger
from hetero_ppo.observability.progress import progress
from hetero_ppo.observability.timers import PhaseTimer
from hetero_ppo.observability.trace import TraceRecorder
from hetero_ppo.reward.golden import GoldenGuard
from hetero_ppo.rollout.generator import Generator
from hetero_ppo.runtime.unsaved import UnsavedWork
from hetero_ppo.step.roles import ACTOR
from hetero_ppo.trainers import ppo_bank, ppo_memory
from hetero_ppo.trainers.ppo_chunks import find_chunk_size
from hetero_ppo.trainers.ppo_data import PpoData
from hetero_ppo.trainers.ppo_evaluation import Evaluator
from hetero_ppo.trainers.ppo_state import STATE_NAMES, load_trainer_state, trainer_state
from hetero_ppo.trainers.ppo_turns import GeneratorTurns
from hetero_ppo.trainers.roles import Roles
from hetero_ppo.trainers.run import Run
from hetero_ppo.types import Experience, PolicyInputs, StepMetrics, ValueInputs

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class PpoTrainer:
    """Rollout, experience, updates of critic and actor, weight sync; once per PPO step. ``open_ppo`` opens its parts."""

    config: PpoConfig
    run: Run
    start: int  # PPO steps that are done already
    data: PpoData
    batching: PpoBatching
    timer: PhaseTimer
    roles: Roles
    golden: Sequence[GoldenGuard]
    maker: ExperienceMaker
    pipeline: Pipeline
    turns: GeneratorTurns
    bank: RolloutBank | None  # None: responses are not kept on disk
    evaluator: Evaluator
    health: HealthMonitor
    chunk_size: int  # responses of a chunk; a sweep or a checkpoint may change it before the first step

    @property
    def total_steps(self) -> int:
        """Number of PPO steps of the whole run."""
        return self.batching.total_steps

    @property
    def actor(self) -> TrainEngine:
        """The policy."""
        return self.roles.actor

    @property
    def device(self) -> SharedDevice:
        """The device that the roles take turns on."""
        return self.turns.device

    @property
    def generator(self) -> Generator:
        """The generator, which answers the prompts."""
        return self.turns.generator

    @property
    def trace(self) -> TraceRecorder:
        """The recorder of the steps' traces."""
        return self.device.trace

    def fit(self) -> None:
        """Train the policy (Schulman et al. 2017, algorithm 1; Ouyang et al. 2022, section 3.5)."""
        config = self.config
        manager = CheckpointManager(
            self.run.dir,
            config.checkpoint,
            self.run.world,
            timeout_s=60 * config.run.timeout_minutes,
            about=self.run.about,
        )
        self._prepare(manager)
        logger = MetricsLogger(
            self.run.dir,
            config.run,
            is_writer=self.run.is_writer,
            total_steps=self.total_steps,
            first_step=self.start + 1,
        )
        with manager, logger:
            unsaved = UnsavedWork(config.checkpoint.every, self.total_steps)
            unsaved.start(self.start)
            self.timer.collect()
            for step in progress(range(self.start, self.total_steps), description="PPO"):
                self.trace.begin(step + 1)
                experience = self.make_experience(step)
                if manager.is_saving:
                    with self.timer.phase("checkpoint"):
                        manager.finish(wait=False)
                self.health.check(Moment.before_training, step + 1, experience.metrics)
                metrics = self.update_roles(experience, step)
                with self.timer.phase("weight_sync"):
                    metrics |= self.sync_weights(step + 1)
                for golden in self.golden:
                    golden.check(step + 1)
                self.maker.kl_controller.update(experience.metrics["kl/reference"], experience.rollout.batch_size)
                metrics = {**experience.metrics, **metrics, **ppo_memory.memory_metrics(self.device)}
                if config.train.eval_every and (step + 1) % config.train.eval_every == 0:
                    with self.timer.phase("eval"):
                        metrics |= self.evaluator.metrics(self.evaluator.run(f"step{step + 1}"))
                self.trace.end()
                self.health.check(Moment.after_step, step + 1, metrics)
                metrics |= self.health.metrics
                logger.log(StepMetrics(step + 1, metrics, self.timer.collect(), self.health.take_note()))
                if step == self.start:
                    ppo_memory.log_ledger(config, self.run, self.device)
                self.evaluator.dump_rollout(step + 1, experience)
                unsaved.step_done(step + 1)
                due = config.checkpoint.every and (step + 1) % config.checkpoint.every == 0
                stopping = self.run.should_stop(step + 1, self.total_steps)
                last = step + 1 == self.total_steps
                if due or stopping or last:
                    with self.timer.phase("checkpoint"):
                        self._save(manager, step + 1, metrics, wait=stopping or last)
                if stopping:
                    self.run.stopped(step + 1)
        self._finish()

    def _prepare(self, manager: CheckpointManager) -> None:
        """Resume from the checkpoint that the run goes on from, give the generator its weights, and evaluate the policy."""
        config = self.config
        manager.check_room(self.roles.trained)
        self._resume(manager)
        if self.turns.needs_first_sync or self.start > 0:
            self.sync_weights(self.start)
        is_new_size = config.pipeline.chunk_size != 0 or self.run.has_changed("pipeline.chunk_size")
        if self.start == 0 or is_new_size:  # a size that a sweep found is the checkpoint's: the bits depend on it
            self.chunk_size = find_chunk_size(
                config.pipeline, config.rollout, self.run.world, self.data, self.batching, self.turns
            )
        for golden in self.golden:
            golden.check(self.start, first=True)
        if not self.run.continues_its_folder:
            self.evaluator.run_and_save("before", f"step{self.start}")
        if self.run.should_stop(self.start, self.total_steps):
            self.run.stopped(self.start, is_saved=False)
        self.run.forget_later_steps(self.start, config.train.replay_rollouts)

    def _finish(self) -> None:
        """Evaluate and export the policy after the last step."""
        self.health.log_counts()
        self.evaluator.run_and_save("after", f"step{self.total_steps}")
        if self.config.checkpoint.export_hf:
            self.turns.sleep()
            with self.actor.on_device(phase="export"):
                more = export_files(self.data.encoder, self.config.actor.model.path, "lm")
                self.actor.model.export(str(self.run.dir / "hf"), files=more.files, config_changes=more.config)
            self.run.exported("the actor ", self.total_steps)

    def make_experience(self, step: int) -> Experience:
        """Roll the current policy out on the prompts of the step, and score the responses."""
        seed = self.config.run.seed * 1_000_003 + step
        with self.timer.phase("rollout"):
            self.turns.wake(shared=self.config.pipeline.overlap)
            request = self.data.next_request(
                self.config.algorithm, self.config.rollout.sampling, self.batching.responses_per_step, seed
            )
            pending = PendingRollout(
                self.generator,
                request,
                self.run.world,
                generator_rank=self.turns.generator_rank,
                version=f"step{step}",
                chunk_size=self.chunk_size,
                bank=self.bank,
                banked=ppo_bank.begin_step(self.bank, self.generator, step, request),
                restart=self.turns.restarter,
                trace=self.trace,
            ).start()
        experience = self.pipeline.make(pending, self.timer, when_generated=self.turns.sleep)
        if self.config.rollout.over_sampling > 1:
            self.data.waiting.keep(*pending.unused())
        return experience

    def update_roles(self, experience: Experience, step: int) -> dict[str, float]:
        """Train the critic, where there is one, and the actor, once the critic's warm-up is over."""
        metrics: dict[str, float] = {}
        critic = self.roles.critic
        if critic is not None:
            with self.timer.phase("train_critic"):
                metrics |= self.update_critic(critic, experience, step)
        if step >= self.config.algorithm.critic_warmup_steps:
            with self.timer.phase("train_actor"):
                metrics |= self.update_actor(experience, step)
        return metrics

    def update_critic(self, critic: TrainEngine, experience: Experience, step: int) -> dict[str, float]:
        """Fit the values to the returns."""
        assert experience.values is not None and experience.returns is not None, (
            "estimators that need values give returns"
        )
        inputs = ValueInputs(experience.values, experience.returns, experience.response_mask)
        return self._update(critic, experience, inputs, critic_loss_fn(self.config.algorithm), step)

    def update_actor(self, experience: Experience, step: int) -> dict[str, float]:
        """Improve the policy within the clip range."""
        inputs = PolicyInputs(
            experience.old_log_probs,
            experience.ref_log_probs,
            experience.advantages,
            experience.response_mask,
            experience.tis_weights,
        )
        actor = self.actor.model
        loss_fn = actor_loss_fn(
            self.config.algorithm, self.maker.temperature, actor.vocab_size, actor.groups, actor.vocab_parts
        )
        return self._update(self.actor, experience, inputs, loss_fn, step)

    def _update(
        self,
        engine: TrainEngine,
        experience: Experience,
        inputs: PolicyInputs | ValueInputs,
        loss_fn: LossFn,
        step: int,
    ) -> dict[str, float]:
        """Train one role in all of its epochs and minibatches, and return its metrics over all of them."""
        rollout, name = experience.rollout, engine.role
        results: list[TrainStepResult] = []
        # During the critic's warm-up the weight sync comes next, which needs the actor.
        then = [ACTOR] if step < self.config.algorithm.critic_warmup_steps else None
        with engine.on_device(grads=True, optimizer=True, phase=f"train_{name}", then=then):
            for rows in self._minibatches(name, rollout.batch_size, step):
                parts = engine.microbatches(rollout.token_ids, rollout.sequence_lengths, inputs, rows)
                results.append(engine.train_step([LossTerm(parts, loss_fn, num_loss_tokens(inputs, rows))]))
        metrics = step_metrics(results)
        # Before its first update the policy is the one that sampled, so this is rounding alone.
        if engine is self.actor:
            first = results[0].terms[0]
            metrics["actor/ppo_kl_first"] = float(first.metric_sums["actor/ppo_kl"]) / max(first.count, 1)
        skipped = sum(result.is_skipped for result in results)
        metrics[f"{name}/grad_norm"] = sum(result.grad_norm for result in results) / max(len(results) - skipped, 1)
        metrics[f"{name}/skipped_steps"] = float(skipped)
        metrics[f"{name}/lr"] = results[-1].learning_rate
        return metrics

    def _minibatches(self, name: str, num_rows: int, step: int) -> list[list[int]]:
        """Return the rows of every minibatch of the step. They are the same on every rank, and for both roles if their passes are alike."""
        own = passes(self.config.algorithm, name)
        generator = torch.Generator().manual_seed(self.config.run.seed * 7_919 + step)
        minibatches = []
        for _ in range(own.epochs):
            order = torch.randperm(num_rows, generator=generator).tolist()
            size = own.minibatch_size
            minibatches += [order[start : start + size] for start in range(0, num_rows, size)]
        return minibatches

    def sync_weights(self, step: int) -> dict[str, float]:
        """Hand the actor's weights to the generator, and check that it answers with them. Collective.

        Args:
            step: Number of steps that are done, which labels the weights.

        Raises:
            RuntimeError: The generator's log-probs of the probe prompt are not the trainer's.
        """
        ids = self.data.probe_ids
        verify = self.config.rollout.verify_sync and not self.generator.capabilities.is_recorded
        with self.actor.on_device(phase="weight_sync"):
            self.turns.wake_for_sync()
            tensors = self.actor.model.stream_weights()
            with self.turns.at_work("weight sync"):
                self.generator.sync_weights(tensors, f"step{step}")
            log_probs = probe_log_probs(self.actor.model, ids) if verify else []
        metrics: dict[str, float] = {}
        if verify:
            self.turns.wake()
            metrics = self.turns.check_probe(ids, log_probs)
        return metrics | self.generator.sync_metrics()

    def _save(self, manager: CheckpointManager, step: int, metrics: dict[str, float], *, wait: bool) -> None:
        state = {**trainer_state(self.data, self.maker, self.health), "chunk_size": self.chunk_size}
        bank = self.bank

        def then() -> None:
            if bank is not None:
                bank.forget(step)

        manager.save(step, self.roles.trained, state, metrics, wait=wait, then=then)

    def _resume(self, manager: CheckpointManager) -> None:
        if self.config.checkpoint.load is None:
            return
        names = {*STATE_NAMES, "chunk_size"}
        state = manager.load(Path(self.config.checkpoint.load), self.roles.trained, names)
        load_trainer_state(state, self.data, self.maker, self.health, self.run)
        self.chunk_size = int(state["chunk_size"])
        log.info(f"resumed PPO from {self.config.checkpoint.load} at step {self.start}")

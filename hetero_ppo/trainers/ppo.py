"""Proximal policy optimisation from reward models, a reward function, or both."""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist

from hetero_ppo.checkpoint.manager import CheckpointManager
from hetero_ppo.config.derived import actor_generates, passes
from hetero_ppo.config.schema import PpoConfig
from hetero_ppo.data.export_files import export_files
from hetero_ppo.engines.loss_terms import LossFn, LossTerm, TrainStepResult, num_loss_tokens, step_metrics
from hetero_ppo.engines.losses import actor_loss_fn, critic_loss_fn
from hetero_ppo.engines.train_engine import TrainEngine
from hetero_ppo.experience.pending_rollout import PendingRollout
from hetero_ppo.experience.pipeline import Pipeline
from hetero_ppo.health.check import Moment
from hetero_ppo.health.monitor import HealthMonitor
from hetero_ppo.health.registry import build_checks
from hetero_ppo.observability.metrics import MetricsLogger
from hetero_ppo.observability.progress import progress
from hetero_ppo.observability.timers import PhaseTimer
from hetero_ppo.rollout.generator import Generator
from hetero_ppo.runtime.unsaved import UnsavedWork
from hetero_ppo.step.placement import run_placement
from hetero_ppo.step.roles import ACTOR
from hetero_ppo.trainers import ppo_bank, ppo_functions, ppo_generator, ppo_memory, ppo_nodes, ppo_setup
from hetero_ppo.trainers.ppo_turns import GeneratorTurns
from hetero_ppo.trainers.ppo_evaluation import Evaluator
from hetero_ppo.trainers.run import Run, first_step
from hetero_ppo.trainers.run_inputs import model_inputs, text_inputs
from hetero_ppo.types import Experience, PolicyInputs, StepMetrics, ValueInputs
from megatron_bridge import platform

log = logging.getLogger(__name__)


class PpoTrainer:
    """Rollout, experience, updates of critic and actor, weight sync; once per PPO step."""

    def __init__(self, config: PpoConfig, run: Run) -> None:
        """Load data, start the generator, build the roles.

        Args:
            config: checked.
            run: of this process.
        """
        self.config = config
        self.run = run
        ppo_memory.log_plan(config, run)
        self.data = ppo_setup.load_data(config, run)
        self.functions = ppo_functions.open_functions(config, run, self.data.encoder)
        re_encoders = ppo_setup.build_re_encoders(config, self.data)
        self.functions.check(run)
        run.check_inputs(
            text_inputs(config, run.resume, self.data.encoder, self.data.train, re_encoders)
            + model_inputs(config, run.world)
        )
        self.batching = ppo_setup.describe_batching(config, run, self.data)
        self.total_steps = self.batching.total_steps
        self.start = first_step(config.checkpoint, run.dir, self.total_steps)
        self.trace = ppo_setup.trace_recorder(config, run, self.start)
        self.timer = PhaseTimer(platform.synchronize, self.trace, run.watchdog)
        cluster = ppo_nodes.meet(config, run)
        placement = run_placement(config, run.world_size)
        self.node_servers = ppo_nodes.begin_servers(config, run, cluster)
        starting = None
        if not actor_generates(config):
            first = min(self.start, self.total_steps - 1)
            starting = ppo_generator.begin_generator(config, run, self.data.encoder, first, cluster, placement)
            if starting.generator.capabilities.can_sleep:  # it may not hold the device while roles are built on it
                starting.wait().sleep()
                dist.barrier(run.world)
        # An error here is raised at once, not when the generator is up: its guardian ends it with this process.
        self.device = ppo_setup.shared_device(config, self.trace)
        self.roles = ppo_setup.build_roles(config, run, self.batching, self.device, placement)
        self.golden = ppo_setup.build_golden_guards(config, self.roles)
        self.maker = ppo_setup.build_maker(config, self.roles, self.functions.reward, re_encoders)
        self.generator: Generator = (
            ppo_generator.generator_of_actor(config, self.data.encoder, self.roles.actor)
            if starting is None
            else starting.wait()
        )
        self.health = HealthMonitor(build_checks(config))
        self.turns = GeneratorTurns(self.generator, self.device, run.world, placement.generator_rank)
        self.bank = ppo_bank.open_bank(config, run, self.generator, resumes=self.run.continues_its_folder)
        self.chunk_size = self.batching.chunk_size
        self.pipeline = Pipeline(self.maker, config.pipeline.overlap)
        self.evaluator = Evaluator(config, run, self.data, self.maker, self.turns, self.functions.evaluation)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the generator and its processes, and give the host buffers back."""
        try:
            self.functions.close()
            if self.bank is not None:
                self.bank.end()
            self.generator.close()
            if self.node_servers is not None:
                self.node_servers.close()
        finally:  # a lane that still waits for room would keep the process
            self.device.close()

    def fit(self) -> None:
        """The algorithm (Schulman et al. 2017, algorithm 1; Ouyang et al. 2022, section 3.5)."""
        config = self.config
        manager = CheckpointManager(
            self.run.dir,
            config.checkpoint,
            self.run.world,
            timeout_s=60 * config.run.timeout_minutes,
            about=self.run.about,
        )
        manager.check_room(self.roles.trained)
        self._resume(manager)
        if self.turns.needs_first_sync or self.start > 0:
            self.sync_weights(self.start)
        is_new_size = config.pipeline.chunk_size != 0 or self.run.has_changed("pipeline.chunk_size")
        if self.start == 0 or is_new_size:  # a size that a sweep found is the checkpoint's: the bits depend on it
            self.chunk_size = ppo_setup.chunk_size(config, self.run, self.data, self.batching, self.turns)
        for golden in self.golden:
            golden.check(self.start, first=True)
        if not self.run.continues_its_folder:
            self.evaluator.run_and_save("before", f"step{self.start}")
        if self.run.should_stop(self.start, self.total_steps):
            self.run.stopped(self.start, is_saved=False)
        self.run.forget_later_steps(self.start, config.train.replay_rollouts)
        with (
            manager,
            MetricsLogger(
                self.run.dir,
                config.run,
                is_writer=self.run.is_writer,
                total_steps=self.total_steps,
                first_step=self.start + 1,
            ) as logger,
        ):
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
        self.health.log_counts()
        self.evaluator.run_and_save("after", f"step{self.total_steps}")
        if config.checkpoint.export_hf:
            self.turns.sleep()
            with self.actor.on_device(phase="export"):
                more = export_files(self.data.encoder, config.actor.model.path, "lm")
                self.actor.export(str(self.run.dir / "hf"), files=more.files, config_changes=more.config)
            self.run.exported("the actor ", self.total_steps)

    @property
    def actor(self) -> TrainEngine:
        return self.roles.actor

    def make_experience(self, step: int) -> Experience:
        """Roll the current policy out on the step's prompts, and score what it answered."""
        seed = self.config.run.seed * 1_000_003 + step
        with self.timer.phase("rollout"):
            self.turns.wake(shared=self.config.pipeline.overlap)
            request = ppo_setup.step_request(self.data, self.config, self.batching, seed)
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
        actor = self.actor
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
        """All epochs of minibatches of one role; its metrics, over all of them."""
        rollout, name = experience.rollout, engine.role
        results: list[TrainStepResult] = []
        # Without the actor's training the weight sync comes next.
        then = [ACTOR] if step < self.config.algorithm.critic_warmup_steps else None
        with engine.on_device(grads=True, optimizer=True, phase=f"train_{name}", then=then):
            for rows in self._minibatches(name, rollout.batch_size, step):
                parts = engine.microbatches(rollout.token_ids, rollout.sequence_lengths, inputs, rows)
                results.append(engine.train_step([LossTerm(parts, loss_fn, num_loss_tokens(inputs, rows))]))
        metrics = step_metrics(results)
        if engine is self.actor:  # before any update the policy is the one that sampled: what is left is rounding
            first = results[0].terms[0]
            metrics["actor/ppo_kl_first"] = float(first.metric_sums["actor/ppo_kl"]) / max(first.count, 1)
        skipped = sum(result.is_skipped for result in results)
        metrics[f"{name}/grad_norm"] = sum(result.grad_norm for result in results) / max(len(results) - skipped, 1)
        metrics[f"{name}/skipped_steps"] = float(skipped)
        metrics[f"{name}/lr"] = results[-1].learning_rate
        return metrics

    def _minibatches(self, name: str, num_rows: int, step: int) -> list[list[int]]:
        """Rows of every minibatch of the step, the same on every rank, and for both roles where their passes are alike."""
        own = passes(self.config.algorithm, name)
        generator = torch.Generator().manual_seed(self.config.run.seed * 7_919 + step)
        minibatches = []
        for _ in range(own.epochs):
            order = torch.randperm(num_rows, generator=generator).tolist()
            size = own.minibatch_size
            minibatches += [order[start : start + size] for start in range(0, num_rows, size)]
        return minibatches

    def sync_weights(self, step: int) -> dict[str, float]:
        """Hand the actor's weights to the generator, and check that it answers with them.

        Raises:
            RuntimeError: The generator's log-probs of the probe prompt are not the trainer's.
        """
        ids = self.data.probe_ids
        verify = self.config.rollout.verify_sync and not self.generator.capabilities.is_recorded
        with self.actor.on_device(phase="weight_sync"):
            self.turns.wake_for_sync()
            tensors = self.actor.stream_weights()
            with self.turns.at_work("weight sync"):
                self.generator.sync_weights(tensors, f"step{step}")
            log_probs = ppo_setup.probe_log_probs(self.actor, ids) if verify else []
        metrics: dict[str, float] = {}
        if verify:
            self.turns.wake()
            metrics = self.turns.check_probe(ids, log_probs)
        return metrics | self.generator.sync_metrics()

    def _save(self, manager: CheckpointManager, step: int, metrics: dict[str, float], *, wait: bool) -> None:
        state = {**ppo_setup.trainer_state(self.data, self.maker, self.health), "chunk_size": self.chunk_size}
        bank = self.bank

        def then() -> None:
            if bank is not None:
                bank.forget(step)

        manager.save(step, self.roles.trained, state, metrics, wait=wait, then=then)

    def _resume(self, manager: CheckpointManager) -> None:
        if self.config.checkpoint.load is None:
            return
        names = {*ppo_setup.STATE_NAMES, "chunk_size"}
        state = manager.load(Path(self.config.checkpoint.load), self.roles.trained, names)
        ppo_setup.load_trainer_state(state, self.data, self.maker, self.health, self.run)
        self.chunk_size = int(state["chunk_size"])
        log.info(f"resumed PPO from {self.config.checkpoint.load} at step {self.start}")

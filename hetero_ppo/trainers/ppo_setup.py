"""What a PPO run needs before its first step: data and the models of the roles."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from hetero_ppo.algorithms.advantage_registry import build_estimator
from hetero_ppo.algorithms.kl import build_kl_controller
from hetero_ppo.algorithms.rewards import RunningMoments
from hetero_ppo.config.derived import (
    PROBE_TOKENS,
    PpoBatching,
    derive_ppo,
    running_batch,
)
from hetero_ppo.config.schema import PpoConfig, RewardRoleConfig, RoleConfig, TrainedRoleConfig
from hetero_ppo.data.chat_template import TextEncoder, load_text_encoder
from hetero_ppo.data.collate import collate_prompts
from hetero_ppo.data.dataset import Dataset
from hetero_ppo.data.node_share import node_files
from hetero_ppo.data.prompts import PromptExample, load_prompts
from hetero_ppo.data.sampler import ResumableSampler
from hetero_ppo.engines.model_engine import ModelEngine
from hetero_ppo.engines.outputs import log_probs_output
from hetero_ppo.engines.shared_device import SharedDevice
from hetero_ppo.engines.train_engine import TrainEngine
from hetero_ppo.experience.scorers import Scorers
from hetero_ppo.experience.stages import ExperienceMaker
from hetero_ppo.health.mismatch import MismatchGuard
from hetero_ppo.health.monitor import HealthMonitor
from hetero_ppo.observability.trace import TRACE_FOLDER, TraceRecorder
from hetero_ppo.reward.function import FunctionReward
from hetero_ppo.reward.golden import GoldenGuard, golden_guard
from hetero_ppo.reward.re_encoding import ReEncoder, load_re_encoders
from hetero_ppo.rollout.generator import GenerationRequest
from hetero_ppo.rollout.partial import PartialBuffer
from hetero_ppo.rollout.sweep import find_running_batch
from hetero_ppo.step.phases import step_phases
from hetero_ppo.step.placement import Placement
from hetero_ppo.step.roles import ACTOR, CRITIC, RoleSpec, run_roles
from hetero_ppo.trainers.ppo_turns import GeneratorTurns
from hetero_ppo.trainers.run import Run
from hetero_ppo.trainers.supervised import build_role, load_sampler
from hetero_ppo.types import PromptBatch

log = logging.getLogger(__name__)


@dataclass
class PpoData:
    """Prompts of the run, the same on every rank."""

    encoder: TextEncoder
    train: Dataset[PromptExample]
    held_out: Dataset[PromptExample] | None
    eval_prompts: PromptBatch | None
    sampler: ResumableSampler
    waiting: PartialBuffer  # with over-sampling: prompts that were read, and their partial responses

    def next_prompts(self) -> PromptBatch:
        """The next ``algorithm.rollout_batch_size`` prompts, over all ranks."""
        return collate_prompts([self.train.examples[row] for row in self.sampler.next_global_batch()])

    @property
    def probe_ids(self) -> list[int]:
        """At least two tokens from the first prompts, for the check after a weight sync."""
        ids: list[int] = []
        for example in self.train.examples:
            ids += example.prompt_ids
            if len(ids) >= 2:
                break
        return ids[:PROBE_TOKENS]


@dataclass(frozen=True)
class Roles:
    """The models of the run."""

    engines: Mapping[str, ModelEngine]  # by the names of ``step.roles``, in the order of building

    @property
    def trained(self) -> dict[str, TrainEngine]:
        """Name -> engine of the roles that have an optimizer."""
        return {name: engine for name, engine in self.engines.items() if isinstance(engine, TrainEngine)}

    @property
    def actor(self) -> TrainEngine:
        """The policy."""
        return self.trained[ACTOR]

    @property
    def critic(self) -> TrainEngine | None:
        """The value model; None where the estimator of advantages needs none."""
        return self.trained.get(CRITIC)

    @property
    def reward_models(self) -> list[ModelEngine]:
        """The models that score responses; none where a reward function alone does."""
        return [engine for engine in self.engines.values() if engine.head == "score"]


def load_data(config: PpoConfig, run: Run) -> PpoData:
    """Read, template and tokenise the prompts.

    Raises:
        ValueError: bad data.
    """
    encoder = load_text_encoder(config.actor.model, config.data, "actor", run.beginning.begun)
    log.info(encoder.describe_ends())
    run.keep_template(encoder)
    train = load_prompts(config.data.train, config.data, encoder, node_files(run.world))
    log.info(train.report.describe())
    held_out = eval_prompts = None
    if config.data.eval is not None:
        held_out = load_prompts(config.data.eval, config.data, encoder, node_files(run.world))
        log.info(held_out.report.describe())
        eval_prompts = collate_prompts(held_out.examples)
    sampler = ResumableSampler(
        len(train),
        config.algorithm.rollout_batch_size,
        dp_rank=0,
        dp_size=1,
        seed=config.run.seed,
        shuffle=config.data.shuffle,
        fingerprint=train.fingerprint,
    )
    return PpoData(encoder, train, held_out, eval_prompts, sampler, PartialBuffer(config.rollout.over_sampling))


def describe_batching(config: PpoConfig, run: Run, data: PpoData) -> PpoBatching:
    """Derive the batch arithmetic and print it."""
    batching = derive_ppo(config, run.world_size, len(data.train))
    log.info(batching.describe())
    return batching


def trace_recorder(config: PpoConfig, run: Run, start: int) -> TraceRecorder:
    """Of the writer's rank, which stands for all; the others record nothing.

    Args:
        start: PPO steps that are done already.
    """
    if not run.is_writer:
        return TraceRecorder()
    return TraceRecorder(run.dir / TRACE_FOLDER, config.train.trace_every, first_step=start + 1)


def shared_device(config: PpoConfig, trace: TraceRecorder) -> SharedDevice:
    """The device that the roles take turns on, in the order of a PPO step."""
    return SharedDevice(config.residency, step_phases(config), trace)


def build_roles(
    config: PpoConfig, run: Run, batching: PpoBatching, device: SharedDevice, placement: Placement
) -> Roles:
    """Build and load the models, one after the other; each leaves the device before the next. Collective over the world.

    Args:
        config: Checked configuration of the run.
        run: The run.
        batching: Batch arithmetic of the run.
        device: Device that the roles share.
        placement: Ranks that each role lives on.

    Raises:
        ValueError: A checkpoint cannot be loaded, or a reward model's has no score head.
    """

    def build(spec: RoleSpec, role: RoleConfig) -> ModelEngine:
        if isinstance(role, TrainedRoleConfig):
            total_steps = batching.roles[spec.name].total_optimizer_steps
            return TrainEngine(spec.name, role, spec.head, total_steps, device, placement.ranks[spec.name])
        return ModelEngine(spec.name, role, spec.head, device=device, ranks=placement.ranks[spec.name])

    engines: dict[str, ModelEngine] = {}
    for name, spec in run_roles(config).items():
        engines[name] = build_role(run, name, spec.config, partial(build, spec))
        initialised = engines[name].load_report.initialised
        if initialised and isinstance(spec.config, RewardRoleConfig):
            raise ValueError(
                f"{name}.model.path is {spec.config.model.path}: the checkpoint has no score head "
                f"({', '.join(initialised)}); give the export of a reward-model run"
            )
    return Roles(engines)


def build_golden_guards(config: PpoConfig, roles: Roles) -> list[GoldenGuard]:
    """Build a guard for every reward model that has golden scores; log why the others have none."""
    guards = []
    for engine in roles.reward_models:
        guard, note = golden_guard(engine, config.reward.golden_every)
        log.info(note)
        guards += [] if guard is None else [guard]
    return guards


def build_re_encoders(config: PpoConfig, data: PpoData) -> dict[str, ReEncoder]:
    """Build the re-encoders of reward models that have a tokenizer of their own, by role, and log what they do.

    Raises:
        ValueError: a template does not take the prompts.
    """
    found = load_re_encoders(config, data.encoder, [data.train, *([] if data.held_out is None else [data.held_out])])
    for re_encoder in found.values():
        log.info(re_encoder.describe())
    return found


def build_maker(
    config: PpoConfig, roles: Roles, function: FunctionReward | None, re_encoders: Mapping[str, ReEncoder]
) -> ExperienceMaker:
    """The stages over these roles, and over the reward function."""
    return ExperienceMaker(
        engines=roles.engines,
        phases=step_phases(config),
        scorers=Scorers(roles.reward_models, function, config.reward, re_encoders),
        estimator=build_estimator(config.algorithm),
        algorithm=config.algorithm,
        reward_config=config.reward,
        temperature=config.rollout.sampling.temperature,
        kl_controller=build_kl_controller(config.algorithm.kl),
        score_moments=RunningMoments(),
    )


def chunk_size(config: PpoConfig, run: Run, data: PpoData, batching: PpoBatching, turns: GeneratorTurns) -> int:
    """Return the responses of a chunk: the config's number, or what a sweep of the generator finds. Collective over the world."""
    if config.pipeline.chunk_size != 0:
        return batching.chunk_size
    found = torch.zeros(1, dtype=torch.int64)
    with turns.generating() as generator:
        if generator.is_here:
            largest = running_batch(config.rollout, run.world_size)
            prompts = collate_prompts(data.train.examples[:largest])
            sampling, budget_s = config.rollout.sampling, config.pipeline.sweep_s
            result = find_running_batch(generator, prompts, sampling, largest=largest, budget_s=budget_s)
            log.info(result.table())
            found[0] = min(result.batch, batching.responses_per_step)
    if run.world_size > 1:
        dist.broadcast(found, turns.generator_rank, group=run.world)
    return int(found)


def step_request(data: PpoData, config: PpoConfig, batching: PpoBatching, seed: int) -> GenerationRequest:
    """Return what a PPO step asks of the generator.

    Args:
        data: Prompts of the run; the step takes its own from them.
        config: Configuration of the run.
        batching: Batch arithmetic of the run.
        seed: Seed of the request.
    """
    n, sampling = config.algorithm.samples_per_prompt, config.rollout.sampling
    if config.rollout.over_sampling == 1.0:
        return GenerationRequest(data.next_prompts(), sampling, n=n, seed=seed)
    num_needed = batching.responses_per_step
    prompts = data.waiting.take(num_needed, data.next_prompts, n)
    partial = data.waiting.partial[: len(prompts)]
    return GenerationRequest(prompts, sampling, n=1, seed=seed, partial=partial, num_needed=num_needed)


#: What ``load_trainer_state`` reads.
STATE_NAMES = ("prompts", "kl_controller", "score_moments", "waiting")


def trainer_state(data: PpoData, maker: ExperienceMaker, health: HealthMonitor) -> dict[str, Any]:
    """What a PPO checkpoint holds beside the trained roles."""
    return {
        "prompts": data.sampler.state_dict(),
        "kl_controller": maker.kl_controller.state_dict(),
        "score_moments": maker.score_moments.state_dict(),
        "waiting": data.waiting.state_dict(),
        "health": health.state_dict(),
        "template_sha256": data.encoder.template_hash,
    }


def load_trainer_state(
    state: dict[str, Any], data: PpoData, maker: ExperienceMaker, health: HealthMonitor, run: Run
) -> None:
    """The reverse of ``trainer_state``. A KL coefficient or controller that the configuration has changed is not taken back.

    Raises:
        ValueError: prompts of the checkpoint wait for a response, and there is no over-sampling to give them one.
    """
    data.waiting.load_state_dict(state["waiting"])
    load_sampler(data.sampler, state["prompts"], run)
    if not (run.has_changed("algorithm.kl.coef") or run.has_changed("algorithm.kl.controller")):
        maker.kl_controller.load_state_dict(state["kl_controller"])
    maker.score_moments.load_state_dict(state["score_moments"])
    health.load_state_dict(state["health"] if "health" in state else _health_of_older_version(state))


def _health_of_older_version(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of the health checks in a checkpoint that was written before they had one."""
    return {"checks": {MismatchGuard.rule: state["mismatch_guard"]}, "warnings": {}}


def probe_log_probs(actor: ModelEngine, token_ids: list[int]) -> list[float]:
    """Return [L - 1] log p(token t + 1 | tokens 0..t) at temperature 1, by the trainer, for L tokens. Collective."""
    output = log_probs_output(
        temperature=1.0, vocab_size=actor.vocab_size, groups=actor.groups, num_parts=actor.vocab_parts
    )
    return actor.forward(torch.tensor([token_ids]), torch.tensor([len(token_ids)]), output)[0].tolist()

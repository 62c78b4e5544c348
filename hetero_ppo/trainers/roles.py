"""Builds the models of a run: each is loaded, aligned where that was asked for, and described in the log."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from hetero_ppo.config.derived import PpoBatching
from hetero_ppo.config.schema import HeadInit, PpoConfig, RoleConfig, TrainedRoleConfig
from hetero_ppo.engines.model_engine import ModelEngine, head_start
from hetero_ppo.engines.shared_device import SharedDevice
from hetero_ppo.engines.train_engine import TrainEngine, model_of
from hetero_ppo.observability.logs import ONCE
from hetero_ppo.reward.self_check import build_proved
from hetero_ppo.step.placement import Placement
from hetero_ppo.step.roles import ACTOR, CRITIC, RoleSpec, run_roles
from hetero_ppo.trainers.run import Run
from megatron_bridge import platform

log = logging.getLogger(__name__)

C = TypeVar("C", bound=RoleConfig)
RoleEngine = TypeVar("RoleEngine", ModelEngine, TrainEngine)


@dataclass(frozen=True)
class Roles:
    """The models of a PPO run."""

    engines: Mapping[str, ModelEngine]  # models of all roles by the names of ``step.roles``, in the order of building
    trained: Mapping[str, TrainEngine]  # roles that have an optimizer, by name

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


def build_roles(
    config: PpoConfig, run: Run, batching: PpoBatching, device: SharedDevice, placement: Placement
) -> Roles:
    """Build and load the models of a PPO run, one after the other; each leaves the device before the next. Collective over the world.

    Args:
        config: Configuration of the run.
        run: Run of this process.
        batching: Batch arithmetic of the run, for the length of the schedules.
        device: Device that the roles take turns on.
        placement: Ranks that each role lives on.

    Raises:
        ValueError: A checkpoint cannot be loaded, or a reward model's has no score head.
        RunError: A role has to be aligned, and its bits depend on the batch.
    """
    engines: dict[str, ModelEngine] = {}
    trained: dict[str, TrainEngine] = {}
    for name, spec in run_roles(config).items():
        if spec.is_trained:
            num_steps = batching.roles[name].total_optimizer_steps
            build = _trained(spec, num_steps, device, placement.ranks[name])
            trained[name] = build_role(run, name, spec.trained_config, build)
            engines[name] = trained[name].model
        else:
            engines[name] = build_role(run, name, spec.config, _frozen(spec, device, placement.ranks[name]))
            initialised = engines[name].load_report.initialised
            if initialised and spec.head == "score":
                raise ValueError(
                    f"{name}.model.path is {spec.config.model.path}: the checkpoint has no score head "
                    f"({', '.join(initialised)}); give the export of a reward-model run"
                )
    return Roles(engines, trained)


def _trained(
    spec: RoleSpec, num_steps: int, device: SharedDevice, ranks: Sequence[int]
) -> Callable[[TrainedRoleConfig], TrainEngine]:
    """Return what builds a role with an optimizer, whose schedule has ``num_steps`` steps."""
    return lambda role: TrainEngine(spec.name, role, spec.head, num_steps, device, ranks)


def _frozen(spec: RoleSpec, device: SharedDevice, ranks: Sequence[int]) -> Callable[[RoleConfig], ModelEngine]:
    """Return what builds a role without an optimizer."""
    return lambda role: ModelEngine(spec.name, role, spec.head, device=device, ranks=ranks)


def build_role(run: Run, name: str, config: C, build: Callable[[C], RoleEngine]) -> RoleEngine:
    """Build one role, aligned where its configuration and the device say so, and log what was loaded. Collective.

    Where ``aligned`` is null in the configuration and in that of the checkpoint's run, the role is computed as that run did. Where it
    cannot be, the log says so.

    Args:
        run: Run of this process. It notes for its checkpoints whether a role is aligned whose ``aligned`` is null.
        name: Name of the role.
        config: Section of the role.
        build: Function that builds the engine of a section.

    Raises:
        RunError: The role has to be aligned, and its bits depend on the batch.
    """
    if config.aligned is not None:
        engine = build_proved(config, build)
        describe_loaded(model_of(engine))
        return engine
    before = None if run.resume is None else run.resume.aligned.get(name)
    engine = build_proved(config if before is not False else dataclasses.replace(config, aligned=False), build)
    model = model_of(engine)
    describe_loaded(model)
    run.aligned[name] = model.bridge.aligned
    if before is False and run.resume is not None:
        model.plain_because = "aligned is null, and it was plain in the run that the checkpoint is of"
        log.info(
            f"{name}: plain, as in the run of {run.resume.folder} ({name}.aligned is null): no golden scores; set it to true to be aligned"
        )
    elif before and run.resume is not None and not model.bridge.aligned:
        log.warning(
            f"{name} was aligned in the run of {run.resume.folder} and is not any more ({name}.{model.plain_because}): the bits of "
            "its outputs are other ones from here on",
            extra=ONCE,
        )
    elif before is None and run.resume is not None and model.bridge.aligned and platform.HAS_CUDA:
        log.info(f"{name}: aligned from here on; {run.resume.folder} does not say whether it was")
    return engine


def describe_loaded(engine: ModelEngine) -> None:
    """Log how many tensors were loaded, and name every one that was initialised instead."""
    report = engine.load_report
    model = engine.config.model
    log.info(f"{engine.role}: {report.loaded} tensors loaded from {model.path}")
    for name in report.initialised:
        start, seed = head_start(model, engine.head)
        how = "at zero" if start is HeadInit.zero else f"at random, seed {seed}"
        log.info(f"{engine.role}: {name} was INITIALISED ({how}): the checkpoint has none")

"""Opens what a PPO run needs, one thing after the other, and closes it in the reverse order."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch.distributed as dist

from hetero_ppo.config.derived import actor_generates, config_reward_models, derive_ppo, max_model_len
from hetero_ppo.config.schema import PpoConfig
from hetero_ppo.engines.shared_device import SharedDevice
from hetero_ppo.experience.pipeline import Pipeline
from hetero_ppo.experience.stages import build_maker
from hetero_ppo.health.monitor import HealthMonitor
from hetero_ppo.health.registry import build_checks
from hetero_ppo.observability.timers import PhaseTimer
from hetero_ppo.reward.golden import golden_guards
from hetero_ppo.reward.re_encoding import load_re_encoders
from hetero_ppo.step.phases import step_phases
from hetero_ppo.step.placement import run_placement
from hetero_ppo.step.roles import run_roles
from hetero_ppo.trainers import ppo_bank, ppo_functions, ppo_generator, ppo_memory, ppo_nodes
from hetero_ppo.trainers.ppo import PpoTrainer
from hetero_ppo.trainers.ppo_data import load_data
from hetero_ppo.trainers.ppo_evaluation import Evaluator
from hetero_ppo.trainers.ppo_turns import GeneratorTurns
from hetero_ppo.trainers.roles import build_roles
from hetero_ppo.trainers.run import Run, first_step
from hetero_ppo.trainers.run_inputs import model_inputs, text_inputs
from megatron_bridge import platform

log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_ppo(config: PpoConfig, run: Run) -> Iterator[PpoTrainer]:
    """Load the data, start the generator and build the roles; close everything when the block ends. Collective over the world.

    Whatever fails, and wherever it fails, what was opened before is closed in the reverse order. The order of opening saves time and
    device memory:

    1. The workers of the Python functions import their modules while the prompts are compared with the checkpoint.
    2. The generator starts in the background while the roles are loaded: both take tens of seconds. One that can sleep is first waited
       for and put to sleep, since it may not hold the device while roles are built there.
    3. The roles are built one after the other, and each leaves the device before the next one. An error here is raised at once: it does
       not wait for a generator that is still starting.

    Args:
        config: Checked configuration of the run.
        run: Run that has its folder and its world.

    Raises:
        ValueError: The data, a function, a checkpoint or a layout cannot be used.
        RunError: The generator did not start.
    """
    with contextlib.ExitStack() as stack:
        ppo_memory.log_plan(config, run)
        data = load_data(config, run)
        functions = stack.enter_context(ppo_functions.open_functions(config.reward, config.train, run, data.encoder))
        re_encoders = load_re_encoders(config_reward_models(config), config.data, data.encoder, data.datasets)
        for re_encoder in re_encoders.values():
            log.info(re_encoder.describe())
        functions.check(run)
        run.check_inputs(
            text_inputs(config, run.resume, data.encoder, data.train, re_encoders)
            + model_inputs(run_roles(config), run.world)
        )
        batching = derive_ppo(config, run.world_size, len(data.train))
        log.info(batching.describe())
        start = first_step(config.checkpoint, run.dir, batching.total_steps)
        trace = run.trace_recorder(config.train.trace_every, num_done=start)
        timer = PhaseTimer(platform.synchronize, trace, run.watchdog)
        placement = run_placement(config, run.world_size)
        starting = None
        if not actor_generates(config):
            has_servers = config.train.replay_rollouts is None
            cluster = ppo_nodes.find_nodes(config.rollout, run) if has_servers else None
            stack.enter_context(ppo_nodes.open_node_servers(config, run, cluster))
            first = min(start, batching.total_steps - 1)
            generator = ppo_generator.build_generator(config, run, data.encoder, first, cluster, placement)
            starting = stack.enter_context(ppo_generator.StartingGenerator(generator))
            if generator.capabilities.can_sleep:
                starting.wait().sleep()
                dist.barrier(run.world)
        device = stack.enter_context(contextlib.closing(SharedDevice(config.residency, step_phases(config), trace)))
        roles = build_roles(config, run, batching, device, placement)
        golden = golden_guards(roles.reward_models, config.reward.golden_every)
        maker = build_maker(config, roles.engines, functions.reward, re_encoders)
        if starting is not None:
            generator = starting.wait()
        else:
            generator = ppo_generator.generator_of_actor(
                config.rollout, data.encoder, roles.actor.model, max_model_len=max_model_len(config)
            )
            stack.enter_context(contextlib.closing(generator))
        turns = GeneratorTurns(generator, device, run.world, placement.generator_rank)
        bank = stack.enter_context(ppo_bank.open_bank(config.rollout, config.checkpoint, run, generator))
        yield PpoTrainer(
            config=config,
            run=run,
            start=start,
            data=data,
            batching=batching,
            timer=timer,
            roles=roles,
            golden=golden,
            maker=maker,
            pipeline=Pipeline(maker, config.pipeline.overlap),
            turns=turns,
            bank=bank,
            evaluator=Evaluator(
                run,
                data,
                maker,
                turns,
                functions.evaluation,
                sampling=config.rollout.eval_sampling,
                dump_rollouts=config.train.dump_rollouts,
            ),
            health=HealthMonitor(build_checks(config)),
            chunk_size=batching.chunk_size,
        )

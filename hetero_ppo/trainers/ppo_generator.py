"""Builds the generator of a PPO run, and starts it while the models are loaded."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from hetero_ppo.config.derived import actor_generates, max_model_len, num_servers, weight_transfer
from hetero_ppo.config.devices import dtype_of
from hetero_ppo.config.schema import PpoConfig
from hetero_ppo.data.chat_template import TextEncoder
from hetero_ppo.engines.model_engine import ModelEngine
from hetero_ppo.rollout.generator import Generator, NullGenerator
from hetero_ppo.rollout.megatron import MegatronGenerator
from hetero_ppo.rollout.replay import ReplayGenerator
from hetero_ppo.rollout.servers.nodes import Cluster
from hetero_ppo.rollout.vllm import VllmGenerator
from hetero_ppo.step.placement import Placement
from hetero_ppo.trainers import ppo_nodes
from hetero_ppo.trainers.run import Run
from megatron_bridge import platform

log = logging.getLogger(__name__)


@dataclass
class StartingGenerator:
    """Starts a generator during the loading of the models: both take tens of seconds."""

    generator: Generator
    _errors: list[BaseException] = field(default_factory=list)

    def begin(self) -> Self:
        """Start in the background. The generator's processes belong to its own thread, which lives on."""

        def start() -> None:
            try:
                self.generator.start()
            except BaseException as error:  # noqa: BLE001  handed to the caller of wait()
                self._errors.append(error)

        self._thread = threading.Thread(target=start, name="rollout-start", daemon=True)
        self._thread.start()
        return self

    def wait(self) -> Generator:
        """Return the generator when it is ready, or raise what its start raised."""
        self._thread.join()
        if self._errors:
            raise self._errors[0]
        return self.generator


def begin_generator(
    config: PpoConfig, run: Run, encoder: TextEncoder, start: int, cluster: Cluster | None, placement: Placement
) -> StartingGenerator:
    """Return the generator on its rank, where it is starting; other ranks get a stand-in. Not for an actor that generates itself.

    Args:
        config: Configuration of the run.
        run: The run.
        encoder: Encoder of the prompts, for the tokens that end a response.
        start: Number of PPO steps that are done already; recorded steps are counted from 1.
        cluster: Nodes of the run, see ``ppo_nodes.meet``.
        placement: Placement of the run, which says on which rank the generator is.
    """
    assert not actor_generates(config), "the actor is built first"
    is_here = run.world.rank() == placement.generator_rank
    if config.train.replay_rollouts is not None:
        if not is_here:
            return StartingGenerator(NullGenerator(ReplayGenerator.capabilities)).begin()
        return StartingGenerator(ReplayGenerator(Path(config.train.replay_rollouts), start + 1)).begin()
    capabilities = VllmGenerator.capabilities_of(config.rollout, cuda=platform.HAS_CUDA)
    if not is_here:
        return StartingGenerator(NullGenerator(capabilities)).begin()
    transfer = weight_transfer(config.rollout, one_node=cluster is None)
    log.info(f"weights get into the rollout servers by {transfer.value} (rollout.weight_transfer)")
    generator = VllmGenerator(
        replace(config.rollout, num_servers=num_servers(config.rollout, run.world_size), weight_transfer=transfer),
        model_path=config.actor.model.path,
        dtype=dtype_of(config.actor.model),
        run_dir=run.dir,
        max_model_len=max_model_len(config),
        eos_token_ids=encoder.end_token_ids,
        # A generator that sleeps gets its first weights by a sync like all others, so that it can drop them.
        initial_version=None if capabilities.can_sleep else "step0",
        tokenizer_path=ppo_nodes.servers_tokenizer(config),
        cluster=cluster,
    )
    return StartingGenerator(generator).begin()


def generator_of_actor(config: PpoConfig, encoder: TextEncoder, actor: ModelEngine) -> MegatronGenerator:
    """Return the actor as its own generator; every rank has it."""
    return MegatronGenerator(
        config.rollout,
        actor,
        max_model_len=max_model_len(config),
        eos_token_ids=encoder.end_token_ids,
        initial_version="step0",
        decode=encoder.decode,
    )

"""Builds the generator of a PPO run, and starts it while the models are loaded."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from hetero_ppo.config.derived import actor_generates, max_model_len, num_servers, weight_transfer
from hetero_ppo.config.devices import dtype_of
from hetero_ppo.config.schema import PpoConfig, RolloutConfig
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


class StartingGenerator:
    """A generator that starts in a thread of its own, while the models are loaded; both take tens of seconds.

    A context manager. Leaving it closes the generator. One that is still starting then is not waited for: its thread closes it when it has
    started. Where the process ends before that, the guardians of its servers end them.

    Args:
        generator: Generator that is not started yet.
    """

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self._thread = threading.Thread(target=self._start, name="rollout-start", daemon=True)
        self._lock = threading.Lock()
        self._has_started = False
        self._is_left = False
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._is_left = True
            if not self._has_started:
                return
        self.generator.close()

    def wait(self) -> Generator:
        """Return the generator when it is ready, or raise the error of its start."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self.generator

    def _start(self) -> None:
        try:
            self.generator.start()
        except BaseException as error:  # noqa: BLE001  raised by wait()
            self._error = error
        with self._lock:
            self._has_started = True
            if not self._is_left:
                return
        self.generator.close()


def build_generator(
    config: PpoConfig, run: Run, encoder: TextEncoder, num_done: int, cluster: Cluster | None, placement: Placement
) -> Generator:
    """Build the generator of a run whose actor does not generate itself. Ranks other than its own get a stand-in.

    Args:
        config: Configuration of the run.
        run: Run of this process.
        encoder: Encoder of the prompts, for the tokens that end a response.
        num_done: Number of PPO steps that are done already; recorded steps are counted from 1.
        cluster: Nodes with rollout servers, from ``ppo_nodes.find_nodes``.
        placement: Placement of the run, which says on which rank the generator is.
    """
    assert not actor_generates(config), "the actor is built first"
    is_here = run.world.rank() == placement.generator_rank
    if config.train.replay_rollouts is not None:
        if not is_here:
            return NullGenerator(ReplayGenerator.capabilities)
        return ReplayGenerator(Path(config.train.replay_rollouts), num_done + 1)
    capabilities = VllmGenerator.capabilities_of(config.rollout, cuda=platform.HAS_CUDA)
    if not is_here:
        return NullGenerator(capabilities)
    transfer = weight_transfer(config.rollout, one_node=cluster is None)
    log.info(f"weights get into the rollout servers by {transfer.value} (rollout.weight_transfer)")
    return VllmGenerator(
        replace(config.rollout, num_servers=num_servers(config.rollout, run.world_size), weight_transfer=transfer),
        model_path=config.actor.model.path,
        dtype=dtype_of(config.actor.model),
        run_dir=run.dir,
        max_model_len=max_model_len(config),
        eos_token_ids=encoder.end_token_ids,
        # A generator that sleeps gets its first weights by a sync like all others, so that it can drop them.
        initial_version=None if capabilities.can_sleep else "step0",
        tokenizer_path=ppo_nodes.servers_tokenizer(config.rollout, config.actor.model),
        cluster=cluster,
    )


def generator_of_actor(
    rollout: RolloutConfig, encoder: TextEncoder, actor: ModelEngine, *, max_model_len: int
) -> MegatronGenerator:
    """Return the actor as its own generator. Every rank has it.

    Args:
        rollout: The ``rollout`` section.
        encoder: Encoder of the prompts, for the tokens that end a response and the texts of stop strings.
        actor: Policy.
        max_model_len: Number of tokens of the longest prompt and response together.
    """
    return MegatronGenerator(
        rollout,
        actor,
        max_model_len=max_model_len,
        eos_token_ids=encoder.end_token_ids,
        initial_version="step0",
        decode=encoder.decode,
    )

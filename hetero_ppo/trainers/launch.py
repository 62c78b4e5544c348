"""Start the run that a config file describes. Called on every rank by torchrun."""

from __future__ import annotations

import gc
import logging
import os
from typing import TYPE_CHECKING

import torch

from hetero_ppo.algorithms.advantage_registry import check_advantage
from hetero_ppo.config.checks import check_config, check_paths
from hetero_ppo.config.load import LoadedConfig
from hetero_ppo.config.schema import RmConfig, SftConfig
from hetero_ppo.config.unused import unused_options
from hetero_ppo.data.chat_template import check_tokenizers
from hetero_ppo.errors import RunError, StoppedOnRequest
from hetero_ppo.runtime.settle import settle

if TYPE_CHECKING:
    from hetero_ppo.runtime.heartbeat import Heartbeat
    from hetero_ppo.trainers.run import Run
    from hetero_ppo.trainers.stopping import StopRequests

log = logging.getLogger(__name__)


def main(loaded: LoadedConfig) -> None:
    """Check the config, then train.

    Args:
        loaded: Configuration as the file and the command line give it.

    Raises:
        ValueError: The config or the data cannot be used; nothing was started.
        StoppedOnRequest: A signal ended the run after a checkpoint.
    """
    loaded, decided = settle(loaded, on_cuda=torch.cuda.is_available())
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_config(loaded.config, world_size)
    check_advantage(loaded.config)
    check_paths(loaded.config)
    check_tokenizers(loaded.config)
    # Imported now: torch.distributed takes seconds.
    from hetero_ppo.trainers.stopping import StopRequests

    from hetero_ppo.runtime.heartbeat import Heartbeat

    run = loaded.config.run
    with StopRequests(run.stop_within_s) as stop, Heartbeat(run.heartbeat_timeout_s) as heartbeat:
        _train(loaded, decided, world_size, stop, heartbeat)


def _fit(loaded: LoadedConfig, run: Run) -> None:
    if isinstance(loaded.config, SftConfig):
        from hetero_ppo.trainers.sft import SftTrainer

        _collect_garbage()
        SftTrainer(loaded.config, run).fit()
    elif isinstance(loaded.config, RmConfig):
        from hetero_ppo.trainers.rm import RewardModelTrainer

        _collect_garbage()
        RewardModelTrainer(loaded.config, run).fit()
    else:
        from hetero_ppo.trainers.open_ppo import open_ppo

        _collect_garbage()
        with open_ppo(loaded.config, run) as trainer:
            trainer.fit()


def _collect_garbage() -> None:
    """Switch garbage collection on, which ``cli.main`` switched off. It leaves out the objects that exist now: imported modules."""
    gc.freeze()
    gc.enable()


def _train(loaded: LoadedConfig, decided: list[str], world_size: int, stop: StopRequests, heartbeat: Heartbeat) -> None:
    # Imported now: errors of the config are raised before Megatron-Core is loaded.
    from hetero_ppo.distributed.lost_peer import describe_lost_peer
    from hetero_ppo.engines.layouts import check_checkpoints, check_models_fit_layouts
    from hetero_ppo.memory.plan_check import check_fits
    from hetero_ppo.trainers.run import leave_together, start_run

    check_models_fit_layouts(loaded.config)
    check_checkpoints(loaded.config)
    check_fits(loaded.config, world_size)
    with start_run(loaded, stop, heartbeat) as run:
        for line in [*decided, *unused_options(loaded)]:
            log.info(line)
        try:
            with run.watchdog:
                _fit(loaded, run)
        except StoppedOnRequest:
            leave_together(run)  # torchrun ends a rank that still closes its engine when another one has ended
            raise
        except RuntimeError as error:
            text = describe_lost_peer(error, run.watchdog.failed_in, loaded.config.run.timeout_minutes)
            if text is None:
                raise
            raise RunError(text) from error

"""What every run sets up before its trainer: ranks, threads, the run folder."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy
import torch
import torch.distributed as dist

from hetero_ppo.checkpoint.manager import checkpoint_step, is_exported, mark_exported
from hetero_ppo.config.load import LoadedConfig
from hetero_ppo.config.render import save_config
from hetero_ppo.config.schema import CheckpointConfig, RunConfig
from hetero_ppo.distributed.groups import finish, initialise
from hetero_ppo.errors import StoppedOnRequest
from hetero_ppo.observability.watchdog import Watchdog
from hetero_ppo.trainers.stopping import StopRequests
from megatron_bridge import platform
from megatron_bridge.platform.compiler import check_compiler
from megatron_bridge.platform.determinism import set_deterministic
from megatron_bridge.layers import HAS_TRANSFORMER_ENGINE


@dataclass(frozen=True)
class Run:
    """A run as its trainer sees it."""

    dir: Path
    is_writer: bool  # rank 0: writes files and prints
    world_size: int
    stop: StopRequests
    watchdog: Watchdog

    def say(self, text: str) -> None:
        """Print once for the run."""
        if self.is_writer:
            print(text, flush=True)

    def should_stop(self, step: int, total_steps: int) -> bool:
        """Whether the run is to end after ``step``, because a signal asked for it. Collective over the world, once a step.

        A run that has done its last step goes on to what follows it.
        """
        return self.stop.agreed() and step < total_steps

    def exported(self, what: str, step: int) -> None:
        """Say and note that the weights of the last step are in ``<run.dir>/hf``."""
        self.say(f"exported {what}to {self.dir / 'hf'}")
        if self.is_writer:
            mark_exported(self.dir, step)

    def stopped(self, step: int, *, is_saved: bool = True) -> NoReturn:
        """End the run on request.

        Raises:
            StoppedOnRequest: always.
        """
        self.stop.honoured()
        if is_saved:
            raise StoppedOnRequest(
                f"stopped on request after step {step}, which is saved: go on with checkpoint.load={self.dir}"
            )
        raise StoppedOnRequest(f"stopped on request at step {step}, before another was done: there is nothing new to save")


def start_run(loaded: LoadedConfig, stop: StopRequests) -> Run:
    """Join the world, set seeds and threads, make the run folder and save the resolved config in it.

    Raises:
        ValueError: the run folder cannot be written.
    """
    config: RunConfig = loaded.config.run
    if platform.HAS_CUDA:
        check_compiler()
    kept = set_deterministic(os.environ) if platform.HAS_CUDA and config.deterministic else {}
    initialise(config.timeout_minutes)
    threads = _set_threads(config)
    random.seed(config.seed)
    numpy.random.seed(config.seed)
    torch.manual_seed(config.seed)
    minutes = config.phase_timeout_minutes
    watchdog = Watchdog(Path(config.dir), dist.get_rank(), None if minutes is None else 60 * minutes)
    run = Run(Path(config.dir), dist.get_rank() == 0, dist.get_world_size(), stop, watchdog)
    if run.is_writer:
        try:
            run.dir.mkdir(parents=True, exist_ok=True)
            save_config(loaded, run.dir / "config.yaml")
        except OSError as error:
            raise ValueError(f"run.dir is {config.dir!r}: cannot write there ({error.strerror})") from error
    spec = "Transformer Engine" if HAS_TRANSFORMER_ENGINE else "local"
    run.say(
        f"{loaded.kind} run in {run.dir}: {run.world_size} rank(s) on {platform.device().type}, "
        f"{threads} CPU thread(s) each, Megatron-Core with the {spec} layer spec"
    )
    for name, value in kept.items():
        run.say(f"warning: {name}={value} is set outside of the run: two runs may differ in bits (run.deterministic)")
    if platform.HAS_CUDA and not config.deterministic:
        run.say("run.deterministic=false: two runs may differ in bits, and so may a resumed one")
    dist.barrier()
    return run


def _set_threads(config: RunConfig) -> int:
    local_ranks = int(os.environ["LOCAL_WORLD_SIZE"])
    threads = config.threads or max(1, len(os.sched_getaffinity(0)) // local_ranks)
    torch.set_num_threads(threads)
    return threads


def first_step(checkpoint: CheckpointConfig, run_dir: Path, total_steps: int) -> int:
    """The step that a run begins with: 0, or that of the checkpoint it resumes from.

    A run that was stopped after its last step, in the evaluation or the export, goes on with these: it begins at its last step.

    Raises:
        ValueError: there is no checkpoint, it is damaged, or it leaves nothing to do.
    """
    if checkpoint.load is None:
        return 0
    step = checkpoint_step(Path(checkpoint.load), checkpoint.step)
    is_own = Path(checkpoint.load).resolve() == run_dir.resolve()
    has_to_export = is_own and checkpoint.export_hf and not is_exported(run_dir, step)
    if step > total_steps or (step == total_steps and not has_to_export):
        raise ValueError(
            f"checkpoint.load={checkpoint.load}: it is at step {step} of {total_steps}, zero steps are left to do; "
            "raise train.steps (or train.epochs), or start anew without checkpoint.load"
        )
    return step


def leave_together() -> None:
    """Wait for all ranks before the end."""
    dist.barrier()


def end_run() -> None:
    """Leave the world."""
    finish()

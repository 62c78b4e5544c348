"""Opens what every kind of run needs before its trainer: the world, seeds, threads, the run folder."""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import numpy
import torch
import torch.distributed as dist

from hetero_ppo.checkpoint.manager import checkpoint_step, is_exported, mark_exported
from hetero_ppo.config.load import LoadedConfig
from hetero_ppo.config.on_resume import is_named
from hetero_ppo.config.render import save_config
from hetero_ppo.config.schema import CheckpointConfig, RunConfig
from hetero_ppo.data.chat_template import TextEncoder
from hetero_ppo.data.export_files import TEMPLATE_FILE
from hetero_ppo.distributed.groups import finish, initialise
from hetero_ppo.distributed.text import broadcast_json
from hetero_ppo.errors import StoppedOnRequest
from hetero_ppo.observability.logs import ONCE, console_logging
from hetero_ppo.observability.records import CONFIG_FILE
from hetero_ppo.observability.trace import TRACE_FOLDER, TraceRecorder
from hetero_ppo.observability.watchdog import Watchdog
from hetero_ppo.runtime.heartbeat import Heartbeat
from hetero_ppo.runtime.inputs import Input, check_inputs, differing
from hetero_ppo.runtime.later_steps import forget_later_steps
from hetero_ppo.runtime.resume import DIGESTS_VERSION, Beginning, Resume, beginning, read_resume
from hetero_ppo.runtime.run_folder import claimed_folder
from hetero_ppo.trainers.stopping import StopRequests
from megatron_bridge import platform
from megatron_bridge.platform.compiler import check_compiler
from megatron_bridge.platform.idle_gpus import check_gpus_are_used
from megatron_bridge.platform.determinism import set_deterministic
from megatron_bridge.model.layers import HAS_TRANSFORMER_ENGINE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run as its trainer sees it."""

    dir: Path
    world: dist.ProcessGroup  # all ranks
    stop: StopRequests
    watchdog: Watchdog
    beginning: Beginning
    resume: Resume | None  # the checkpoint that it goes on from; None: it starts from the beginning
    # Name -> digest of what the run is made from; filled by check_inputs.
    inputs: dict[str, str] = field(default_factory=dict)
    # Role whose ``aligned`` is null -> whether it is aligned; filled by build_role.
    aligned: dict[str, bool] = field(default_factory=dict)
    changed_inputs: set[str] = field(default_factory=set)  # names of inputs that differ from the checkpoint's and may

    @property
    def is_writer(self) -> bool:
        """True on rank 0, which writes files and prints."""
        return self.world.rank() == 0

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.world.size()

    @property
    def continues_its_folder(self) -> bool:
        """True when the folder has earlier files of this run, which have to stay."""
        return self.resume is not None and self.resume.is_own_folder

    @property
    def about(self) -> dict[str, Any]:
        """Record of the run that every checkpoint holds."""
        started_at = self.beginning.started_at.isoformat()
        about = {
            "run_id": self.beginning.run_id,
            "begun": started_at,  # as in checkpoints of older versions
            "inputs": self.inputs,
            "digests_version": DIGESTS_VERSION,
        }
        return {**about, "aligned": self.aligned}

    def check_inputs(self, inputs: Sequence[Input]) -> None:
        """Compare what the run is made from with the checkpoint that it goes on from, and note it for its own checkpoints.

        Raises:
            ValueError: An input has another content, and ``checkpoint.allow_changes`` does not name it.
        """
        for line in check_inputs(self.resume, inputs):
            log.info(line)
        self.inputs.update({one.name: one.digest for one in inputs})
        self.changed_inputs.update(one.name for one in differing(self.resume, inputs))

    def allows(self, name: str) -> bool:
        """Return whether ``checkpoint.allow_changes`` names a field, or its content differs and may."""
        return self.resume is not None and (name in self.changed_inputs or is_named(name, self.resume.allowed))

    def has_changed(self, name: str) -> bool:
        """Return whether a field has another value than in the checkpoint that the run goes on from."""
        return self.resume is not None and self.resume.has_changed(name)

    def keep_template(self, encoder: TextEncoder) -> None:
        """Write the chat template of the run into its folder, where `hetero-ppo export` finds it."""
        if self.is_writer and encoder.template is not None:
            (self.dir / TEMPLATE_FILE).write_text(encoder.template, encoding="utf-8")

    def should_stop(self, step: int, total_steps: int) -> bool:
        """Return whether a signal asked the run to end after ``step``. Collective over the world, once a step.

        A run that has done its last step goes on to the evaluation and the export.
        """
        return self.stop.agreed(self.world) and step < total_steps

    def trace_recorder(self, every: int, *, num_done: int) -> TraceRecorder:
        """Return the recorder of rank 0, which stands for all ranks. Other ranks get one that records nothing.

        Args:
            every: Steps between traces; 0: none.
            num_done: Number of steps that are done already.
        """
        if not self.is_writer:
            return TraceRecorder()
        return TraceRecorder(self.dir / TRACE_FOLDER, every, first_step=num_done + 1)

    def forget_later_steps(self, step: int, replayed: str | None = None) -> None:
        """Remove what the folder holds of steps after ``step``, where the run goes on in it. Rank 0 does it, before the next step.

        Args:
            step: Number of steps that are done.
            replayed: Folder of rollouts that the run answers from.
        """
        if self.is_writer and self.continues_its_folder:
            for line in forget_later_steps(self.dir, step, replayed=None if replayed is None else Path(replayed)):
                log.info(line)

    def exported(self, what: str, step: int) -> None:
        """Log and note that the weights of the last step are in ``<run.dir>/hf``."""
        log.info(f"exported {what}to {self.dir / 'hf'}")
        if self.is_writer:
            mark_exported(self.dir, step)

    def stopped(self, step: int, *, is_saved: bool = True) -> NoReturn:
        """End the run on request.

        Raises:
            StoppedOnRequest: Always.
        """
        self.stop.honoured()
        if is_saved:
            raise StoppedOnRequest(
                f"stopped on request after step {step}, which is saved: go on with checkpoint.load={self.dir}"
            )
        raise StoppedOnRequest(
            f"stopped on request at step {step}, before another was done: there is nothing new to save, and the same command goes on"
        )


@contextlib.contextmanager
def start_run(loaded: LoadedConfig, stop: StopRequests, heartbeat: Heartbeat | None = None) -> Iterator[Run]:
    """Join the world, set seeds and threads, and hold the run folder, with the resolved config in it, for the block.

    Args:
        loaded: Checked configuration.
        stop: Requests to stop, which end the run after a step.
        heartbeat: Heartbeat that gets the names of the phases; None: there is none.

    Raises:
        ValueError: The run folder cannot be written, is in use, or holds results of another run; or there is no checkpoint to go on
            from, or it is of another objective; or the run would leave the machine's GPUs idle.
    """
    config: RunConfig = loaded.config.run
    with contextlib.ExitStack() as stack:
        stack.enter_context(console_logging(config.log_level, config.log_format))
        if platform.HAS_CUDA:
            check_compiler()
        else:
            check_gpus_are_used()
        kept = set_deterministic(os.environ) if platform.HAS_CUDA and config.deterministic else {}
        world = initialise(config.timeout_minutes)
        stack.callback(end_run)
        threads = _set_threads(config)
        random.seed(config.seed)
        numpy.random.seed(config.seed)
        torch.manual_seed(config.seed)
        minutes = config.phase_timeout_minutes
        watchdog = Watchdog(
            Path(config.dir),
            world.rank(),
            None if minutes is None else 60 * minutes,
            on_phase=None if heartbeat is None else heartbeat.note,
        )
        resume = read_resume(loaded)
        dist.barrier(world)  # rank 0 may now replace what the others have read
        notes, start = _claim_folder(loaded, resume, stack, world)
        run = Run(Path(config.dir), world, stop, watchdog, start, resume)
        spec = "Transformer Engine (in bf16; in fp32 the local)" if HAS_TRANSFORMER_ENGINE else "local"
        log.info(
            f"{loaded.kind} run in {run.dir}: {run.world_size} rank(s) on {platform.device().type}, "
            f"{threads} CPU thread(s) each, Megatron-Core with the {spec} layer spec"
        )
        for name, value in kept.items():
            log.warning(
                f"{name}={value} is set outside of the run: two runs may differ in bits (run.deterministic)", extra=ONCE
            )
        if platform.HAS_CUDA and not config.deterministic:
            log.info("run.deterministic=false: two runs may differ in bits, and so may a resumed one")
        if config.heartbeat_timeout_s is not None and (heartbeat is None or not heartbeat.is_monitored):
            log.info(
                "run.heartbeat_timeout_s: nobody looks at heartbeats; scripts/train_*.sh and hetero_ppo.cli.launcher do"
            )
        for line in [*notes, *([] if resume is None else [resume.describe()])]:
            log.info(line)
        dist.barrier(world)
        yield run


def _claim_folder(
    loaded: LoadedConfig, resume: Resume | None, stack: contextlib.ExitStack, world: dist.ProcessGroup
) -> tuple[list[str], Beginning]:
    """Return lines about what rank 0 did to the folder, and which run this is. Collective over the world.

    Args:
        loaded: Configuration, which goes into the folder.
        resume: Checkpoint that the run goes on from.
        stack: Stack that holds the folder on rank 0.
        world: Group of all ranks.

    Raises:
        ValueError: Rank 0 cannot use the folder; every rank raises it.
    """
    found: dict[str, Any] = {"error": "", "notes": [], "run_id": "", "started_at": ""}
    if world.rank() == 0:
        folder, start = Path(loaded.config.run.dir), beginning(resume)
        found |= {"run_id": start.run_id, "started_at": start.started_at.isoformat()}
        try:
            found["notes"] = stack.enter_context(claimed_folder(loaded))
            save_config(loaded, str(folder / CONFIG_FILE))
        except ValueError as error:
            found["error"] = str(error)
        except OSError as error:
            found["error"] = f"run.dir is {str(folder)!r}: cannot write there ({error.strerror})"
    found = broadcast_json(found, 0, world)
    if found["error"]:
        raise ValueError(found["error"])
    return found["notes"], Beginning(found["run_id"], datetime.fromisoformat(found["started_at"]))


def _set_threads(config: RunConfig) -> int:
    local_ranks = int(os.environ["LOCAL_WORLD_SIZE"])
    threads = config.threads or max(1, len(os.sched_getaffinity(0)) // local_ranks)
    torch.set_num_threads(threads)
    return threads


def first_step(checkpoint: CheckpointConfig, run_dir: Path, total_steps: int) -> int:
    """Return the number of steps that are done when a run starts: 0, or that of the checkpoint that it resumes from.

    A run that was stopped after its last step, in the evaluation or the export, resumes there: all of its steps are done.

    Args:
        checkpoint: The ``checkpoint`` section.
        run_dir: Folder of the run.
        total_steps: Number of steps of the whole run.

    Raises:
        ValueError: There is no checkpoint, it is damaged, or it leaves nothing to do.
    """
    if checkpoint.load is None:
        return 0
    step = checkpoint_step(Path(checkpoint.load), checkpoint.step)
    is_own = Path(checkpoint.load).resolve() == run_dir.resolve()
    has_to_export = is_own and checkpoint.export_hf and not is_exported(run_dir, step)
    if step > total_steps or (step == total_steps and not has_to_export):
        raise ValueError(
            f"checkpoint.load={checkpoint.load}: it is at step {step} of {total_steps}, zero steps are left to do; "
            "raise train.steps (or train.epochs), or start again without checkpoint.load"
        )
    return step


def leave_together(run: Run) -> None:
    """Wait for all ranks before the end."""
    dist.barrier(run.world)


def end_run() -> None:
    """Leave the world."""
    finish()

"""Sections of the run folder, the process and the checkpoints, which every kind of run has."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from hetero_ppo.config.schema.choices import LogFormat, LogLevel
from hetero_ppo.config.schema.option import PLAIN, OnResume, option


@dataclass
class RunConfig:
    """Run folder, logging, reproducibility and deadlines."""

    dir: str = option(MISSING, "Folder that the run writes everything into", resume=OnResume.start)
    overwrite: bool = option(
        False,
        "A run from the beginning removes the files that an earlier one left in dir; false: it refuses to start there",
        resume=OnResume.start,
    )
    seed: int = option(
        42,
        "Seed of the data order, of sampling and of everything else that is random",
        unit=PLAIN,
        resume=OnResume.objective,
    )
    log_every: int = option(1, "Interval of metrics in the log", unit="steps", minimum=1, resume=OnResume.operation)
    log_level: LogLevel = option(
        LogLevel.info,
        "Lowest level of the lines that are printed on stdout. Ranks other than 0 print only warnings and errors",
        resume=OnResume.operation,
    )
    log_format: LogFormat = option(
        LogFormat.text, "Form of these lines; json: one object per line", resume=OnResume.operation
    )
    threads: int | None = option(
        None, "CPU threads of one rank; null: cores / local ranks", unit="threads", minimum=1, resume=OnResume.operation
    )
    deterministic: bool = option(
        True,
        "Kernels and collectives on CUDA give the same bits twice; false: faster ones. A CPU is always deterministic",
        resume=OnResume.operation,
    )
    tensorboard: bool = option(True, "Metrics are written for TensorBoard too", resume=OnResume.operation)
    wandb_project: str | None = option(
        None, "Project of Weights & Biases, when it is installed; null: none", resume=OnResume.operation
    )
    timeout_minutes: float = option(
        30.0, "Deadline of a collective", unit="minutes", above=0, resume=OnResume.operation
    )
    phase_timeout_minutes: float | None = option(
        120.0,
        "Longest time in which no phase begins or ends, after which a rank dumps its stacks and ends; null: for ever",
        unit="minutes",
        above=0,
        resume=OnResume.operation,
    )
    # Several beats, so that a busy machine ends no run.
    heartbeat_timeout_s: float | None = option(
        300.0,
        "Longest silence of a rank that is stopped, or that hangs in the kernel or in a call that holds the GIL, after "
        "which the launcher ends the run; null: for ever",
        unit="s",
        minimum=4,
        resume=OnResume.operation,
    )
    stop_within_s: float = option(
        240.0,
        "Time from SIGTERM, SIGUSR1 or SIGHUP to the end of the process, with a checkpoint or without",
        unit="s",
        above=0,
        resume=OnResume.operation,
    )


@dataclass
class CheckpointConfig:
    """Saving, keeping and loading of checkpoints."""

    every: int = option(
        0, "Interval of checkpoints; 0: at the end only", unit="steps", minimum=0, resume=OnResume.operation
    )
    async_save: bool = option(
        True,
        "Checkpoints are written during training, from a copy in host memory; false: training waits",
        resume=OnResume.operation,
    )
    keep: int = option(
        2, "Number of newest checkpoints that are kept", unit="checkpoints", minimum=1, resume=OnResume.operation
    )
    keep_best: str | None = option(
        None,
        'Metric whose best checkpoint is kept as well: the highest value, with a leading "-" the lowest; null: none',
        resume=OnResume.operation,
    )
    load: str | None = option(None, "Run folder to resume from; null: a run from the beginning", resume=OnResume.start)
    step: int | None = option(
        None, "Step of the checkpoint to load; null: the newest", unit="steps", minimum=0, resume=OnResume.start
    )
    allow_changes: list[str] = option(
        [], "Fields or sections of the objective that may differ from those of the checkpoint", resume=OnResume.start
    )
    export_hf: bool = option(
        True, "The trained model is exported to <run.dir>/hf when training ends", resume=OnResume.operation
    )

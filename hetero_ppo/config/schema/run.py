"""Sections of the run folder, the process and the checkpoints, which every kind of run has."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from hetero_ppo.config.schema.option import PLAIN, option


@dataclass
class RunConfig:
    """Run folder, logging, reproducibility and deadlines."""

    dir: str = option(MISSING, "Folder that the run writes everything into")
    overwrite: bool = option(
        False,
        "A run from the beginning removes the files that an earlier one left in dir; false: it refuses to start there",
    )
    seed: int = option(42, "Seed of the data order, of sampling and of everything else that is random", unit=PLAIN)
    log_every: int = option(1, "Interval of metrics in the log", unit="steps", minimum=1)
    threads: int | None = option(None, "CPU threads of one rank; null: cores / local ranks", unit="threads", minimum=1)
    deterministic: bool = option(
        True,
        "Kernels and collectives on CUDA give the same bits twice; false: faster ones. A CPU is always deterministic",
    )
    tensorboard: bool = option(True, "Metrics are written for TensorBoard too")
    wandb_project: str | None = option(None, "Project of Weights & Biases, when it is installed; null: none")
    timeout_minutes: float = option(30.0, "Deadline of a collective", unit="minutes", above=0)
    phase_timeout_minutes: float | None = option(
        120.0,
        "Longest time in which no phase begins or ends, after which a rank dumps its stacks and ends; null: for ever",
        unit="minutes",
        above=0,
    )
    # Several beats, so that a busy machine ends no run.
    heartbeat_timeout_s: float | None = option(
        300.0,
        "Longest silence of a rank that is stopped, or that hangs in the kernel or in a call that holds the GIL, after "
        "which the launcher ends the run; null: for ever",
        unit="s",
        minimum=4,
    )
    stop_within_s: float = option(
        240.0,
        "Time from SIGTERM, SIGUSR1 or SIGHUP to the end of the process, with a checkpoint or without",
        unit="s",
        above=0,
    )


@dataclass
class CheckpointConfig:
    """Saving, keeping and loading of checkpoints."""

    every: int = option(0, "Interval of checkpoints; 0: at the end only", unit="steps", minimum=0)
    async_save: bool = option(
        True, "Checkpoints are written during training, from a copy in host memory; false: training waits"
    )
    keep: int = option(2, "Number of newest checkpoints that are kept", unit="checkpoints", minimum=1)
    keep_best: str | None = option(
        None,
        'Metric whose best checkpoint is kept as well: the highest value, with a leading "-" the lowest; null: none',
    )
    load: str | None = option(None, "Run folder to resume from; null: a run from the beginning")
    step: int | None = option(None, "Step of the checkpoint to load; null: the newest", unit="steps", minimum=0)
    allow_changes: list[str] = option(
        [], "Fields or sections of the objective that may differ from those of the checkpoint"
    )
    export_hf: bool = option(True, "The trained model is exported to <run.dir>/hf when training ends")

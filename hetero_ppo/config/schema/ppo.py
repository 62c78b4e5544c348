"""Sections of a PPO run: its length, the overlap with generation, and the roles' turns on the device."""

from __future__ import annotations

from dataclasses import dataclass

from hetero_ppo.config.schema.option import OnResume, option


@dataclass
class PpoTrainConfig:
    """Length, evaluation and records of a PPO run."""

    steps: int | None = option(
        None, "Length of the run; null: epochs decides", unit="PPO steps", minimum=1, resume=OnResume.applied
    )
    epochs: int = option(
        1, "Passes over the prompts where steps is null", unit="passes", minimum=1, resume=OnResume.applied
    )
    eval_every: int = option(
        0,
        "Interval of evaluations; 0: before the first step and after the last only",
        unit="PPO steps",
        minimum=0,
        resume=OnResume.operation,
    )
    eval_function: str | None = option(
        None,
        "Function that checks a held-out answer, in the form of reward.function; null: none",
        resume=OnResume.applied,
    )
    eval_batch: int | None = option(
        None,
        "Answers of one call of eval_function, which then gets lists; null: one",
        unit="answers",
        minimum=1,
        resume=OnResume.operation,
    )
    dump_rollouts: bool = option(
        True, "Rollouts are written to <run.dir>/rollouts/step_*.jsonl", resume=OnResume.operation
    )
    trace_every: int = option(
        50,
        "Interval of traces in <run.dir>/trace, in addition to the first two steps; 0: none",
        unit="PPO steps",
        minimum=0,
        resume=OnResume.operation,
    )
    replay_rollouts: str | None = option(
        None,
        "Folder of recorded rollouts whose token ids take the place of a generator's; null: a generator answers",
        resume=OnResume.applied,
    )


@dataclass
class PipelineConfig:
    """Forwards of complete responses during the generation of others."""

    overlap: bool = option(True, "Forwards begin with the first complete chunk; false: when all responses are complete")
    chunk_size: int | None = option(
        None,
        "Size of a chunk over all ranks; null: the running batch of all servers; 0: a sweep chooses it",
        unit="responses",
        minimum=0,
    )
    sweep_s: float = option(
        20.0,
        "Time for the sweep, which finds the fewest simultaneous responses at which the generator is fastest",
        unit="s",
        above=0,
    )


@dataclass
class ResidencyConfig:
    """Turns of the roles on the device, and the sizes that the memory plan is made for."""

    offload: bool = option(True, "Roles leave the device for host memory when their turn ends; false: all stay")
    overlap: bool = option(
        True, "One role leaves while the next one arrives, before its turn; false: one after the other"
    )
    device_gib: float | None = option(
        None, "Memory of one device; null: as CUDA reports it, and no limit on a CPU", unit="GiB", above=0
    )
    host_gib: float | None = option(
        None, "Host memory of one node; null: the limit of the cgroup, or the machine's memory", unit="GiB", above=0
    )
    pcie_gb_s: float = option(
        25.0, "Copy rate of one device in one direction, for the plan's transfer times", unit="GB/s", above=0
    )

"""Rules of the files and folders that a run reads and writes, other than those of models."""

from __future__ import annotations

import os

from hetero_ppo.config.derived import config_reward_models
from hetero_ppo.config.require import require
from hetero_ppo.config.schema import CheckpointConfig, DataConfig, PpoConfig, RunConfig


def check_data_files(data: DataConfig) -> None:
    """Raise where a data file or the chat template does not exist."""
    for field, path in (
        ("data.train", data.train),
        ("data.eval", data.eval),
        ("data.chat_template", data.chat_template),
    ):
        _require_file(field, path)


def check_run_folders(run: RunConfig, checkpoint: CheckpointConfig) -> None:
    """Raise where the run folder is a file, or the folder to resume from does not exist."""
    require(not os.path.isfile(run.dir), "run.dir", run.dir, "is a file; a run writes into a folder")
    load = checkpoint.load
    require(load is None or os.path.isdir(load), "checkpoint.load", load, "no such run folder")


def check_ppo_files(config: PpoConfig) -> None:
    """Raise where a file that only PPO reads does not exist: a template of a reward model, a function, recorded rollouts."""
    for name, role in config_reward_models(config).items():
        if role.re_encode is not None:
            _require_file(f"{name}.re_encode.chat_template", role.re_encode.chat_template)
    functions = {"reward.function": config.reward.function, "train.eval_function": config.train.eval_function}
    for field, function in functions.items():
        file = "" if function is None else function.rpartition(":")[0]
        require(not file.endswith(".py") or os.path.isfile(file), field, function, "no such Python file")
    replay = config.train.replay_rollouts
    require(replay is None or os.path.isdir(replay), "train.replay_rollouts", replay, "no such folder of rollouts")


def _require_file(field: str, path: str | None) -> None:
    require(path is None or os.path.isfile(path), field, path, f"no such file (current folder: {os.getcwd()})")

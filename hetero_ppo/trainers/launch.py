"""Start the run that a config file describes. Called on every rank by torchrun."""

from __future__ import annotations

import os

from hetero_ppo.config.checks import check_config, check_paths
from hetero_ppo.config.load import load_config
from hetero_ppo.data.chat_template import check_tokenizers


def main(config_path: str, overrides: list[str]) -> None:
    """Load and check the config, then train.

    Args:
        config_path: YAML file with ``kind: sft``, ``rm`` or ``ppo``.
        overrides: ``a.b=c``.

    Raises:
        ValueError: bad config or data; nothing was started.
    """
    loaded = load_config(config_path, overrides)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_config(loaded.config, world_size)
    check_paths(loaded.config)
    check_tokenizers(loaded.config)
    # Imported now: a bad config is said before Megatron-Core is loaded.
    from hetero_ppo.engines.layouts import check_models_fit_layouts
    from hetero_ppo.memory.plan_check import check_fits
    from hetero_ppo.trainers.run import end_run, start_run

    check_models_fit_layouts(loaded.config)
    check_fits(loaded.config, world_size)
    run = start_run(loaded)
    try:
        if loaded.kind == "sft":
            from hetero_ppo.trainers.sft import SftTrainer

            SftTrainer(loaded.config, run).fit()
        elif loaded.kind == "rm":
            from hetero_ppo.trainers.rm import RewardModelTrainer

            RewardModelTrainer(loaded.config, run).fit()
        else:
            from hetero_ppo.trainers.ppo import PpoTrainer

            with PpoTrainer(loaded.config, run) as trainer:
                trainer.fit()
    finally:
        end_run()

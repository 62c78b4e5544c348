"""``hetero-ppo train``: what scripts/train_*.sh start with torchrun, for one process or under torchrun."""

from __future__ import annotations

import argparse
import gc

from hetero_ppo.cli.arguments import add_config_arguments
from hetero_ppo.config.load import load_config


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("train", help="run SFT, reward-model or PPO training, as the file's kind says")
    add_config_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    loaded = load_config(args.config, args.overrides)
    # Imported now: torch, Megatron-Core and the trainers take seconds, which a mistake in the configuration does not wait for.
    from hetero_ppo.runtime.terminal import survive_hangup
    from hetero_ppo.trainers import launch

    survive_hangup()
    launch.main(loaded)
    gc.collect()  # the trainer's models hold process groups in cycles, which must go before the interpreter does

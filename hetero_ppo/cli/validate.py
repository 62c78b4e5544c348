"""``hetero-ppo validate``: what a run would do, checked on a CPU; nothing is trained and no process is started."""

from __future__ import annotations

import argparse

from hetero_ppo.cli.arguments import add_config_arguments


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("validate", help="check config, data and tokenizer; print what a run would do")
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="processes of the run (%(default)s)")
    parser.add_argument(
        "--device-gib",
        type=float,
        default=None,
        metavar="GIB",
        help="memory of one GPU of the run; default: residency.device_gib, or CUDA's. Without any the run is taken for one on CPUs, "
        "whose models are in fp32 where model.dtype is null",
    )
    add_config_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the report, and raise a ValueError or FileNotFoundError for the first thing that would stop the run."""
    # transformers takes seconds to import; `hetero-ppo --help` should not.
    from hetero_ppo.cli.validation import print_validation

    print_validation(args.config, args.overrides, args.world_size, args.device_gib)

"""``hetero-ppo export``: a training checkpoint as a Hugging Face folder."""

from __future__ import annotations

import argparse


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("export", help="write a Hugging Face checkpoint from a run's newest checkpoint")
    parser.add_argument(
        "--run", dest="run_dir", required=True, metavar="DIR", help="run folder (run.dir of its config)"
    )
    parser.add_argument("--role", default=None, help="actor, critic or reward; default: what the run is about")
    parser.add_argument("--step", type=int, default=None, help="default: the newest checkpoint")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    # Megatron-Core takes seconds to import; `hetero-ppo --help` should not.
    from hetero_ppo.trainers import export

    export.run(args)

"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """``--config FILE`` and any number of ``a.b=c``."""
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file with `kind: sft`, `rm` or `ppo`")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="fields that replace those of the file")

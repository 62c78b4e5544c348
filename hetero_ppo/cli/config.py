"""``hetero-ppo config --print``: every option of a run with its value, unit and choices."""

from __future__ import annotations

import argparse
import sys

from hetero_ppo.cli.arguments import add_config_arguments
from hetero_ppo.config.load import load_config, load_draft
from hetero_ppo.config.redact import redact
from hetero_ppo.config.render import render_yaml


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("config", help="print the resolved configuration")
    parser.add_argument("--print", action="store_true", help="print it (the default; there is nothing else to do yet)")
    add_config_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print YAML that ``--config`` reads back. Mandatory fields without a value are shown as ``???``."""
    draft = load_draft(args.config, args.overrides)
    missing = draft.missing_fields()
    for line in draft.removed:
        print(f"note: {line}", file=sys.stderr)
    if missing:
        print(redact(render_yaml(draft)), end="")
        print(f"note: mandatory fields without a value: {', '.join(missing)}", file=sys.stderr)
    else:
        print(redact(render_yaml(load_config(args.config, args.overrides))), end="")

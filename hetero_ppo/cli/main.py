"""The console script ``hetero-ppo``: subcommands, and errors that a user can act on in one line.

A user's mistake is a ``ValueError`` or ``FileNotFoundError``, which prints as ``error: ...`` with exit status 2. A failure during the
run, of a server or of the numbers, prints the same way with exit status 1. A training run that a signal stopped after a checkpoint ends
with status 75 (docs/recovery.md). Everything else is a bug of ours and shows its traceback; ``--traceback`` shows it for all.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from importlib.metadata import version
from pathlib import Path

from hetero_ppo.cli import config, export, init_model, plan, report, reward_model, tokenizer, train, validate
from hetero_ppo.cli.ranks import say_error
from hetero_ppo.config.versions import check_versions
from hetero_ppo.disk import describe, takes_no_more
from hetero_ppo.errors import EXIT_STOPPED, RunError, StoppedOnRequest
from hetero_ppo.observability.logs import console_logging

SUBCOMMANDS = (config, validate, plan, train, export, report, reward_model, tokenizer, init_model)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every subcommand."""
    parser = argparse.ArgumentParser(prog="hetero-ppo", description="SFT, reward model and PPO on Megatron-Core")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('hetero-ppo')}")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an input error was raised")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for subcommand in SUBCOMMANDS:
        subcommand.register(subparsers)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand and return the exit status.

    Args:
        arguments: Arguments without the program's name; None: those of the process.
    """
    args = build_parser().parse_args(arguments)
    gc.disable()  # until a run begins: otherwise the objects of imported modules are scanned again and again
    try:
        check_versions()
        with console_logging():
            args.run(args)
    except (ValueError, FileNotFoundError) as error:
        if args.traceback:
            raise
        say_error(" ".join(str(error).split()))
        return 2
    except (RunError, FloatingPointError) as error:
        if args.traceback:
            raise
        say_error(str(error))
        return 1
    except OSError as error:  # nobody named the file; a full disk is no bug of ours
        if args.traceback or not takes_no_more(error):
            raise
        say_error(describe(error, None if error.filename is None else Path(error.filename), "a file"))
        return 1
    except StoppedOnRequest as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped, file=sys.stderr, flush=True)
        return EXIT_STOPPED
    finally:
        gc.enable()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--config FILE`` and any number of ``a.b=c``."""
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file with `kind: sft`, `rm` or `ppo`")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="fields that replace those of the file")


def add_out_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--out DIR`` and ``--overwrite`` to a command that writes a folder."""
    parser.add_argument("--out", type=Path, required=True, help=f"{what} folder to write")
    parser.add_argument("--overwrite", action="store_true", help=f"replace a {what} that is in --out already")


def clear_out(out: Path, patterns: Sequence[str], *, overwrite: bool) -> None:
    """Refuse or remove files in the folder of ``--out`` that new files would replace or mix with.

    Args:
        out: The folder, which need not exist.
        patterns: Names of the files that would be replaced.
        overwrite: Whether to remove them.

    Raises:
        ValueError: There are some, and ``overwrite`` is not set.
    """
    found = sorted({path for pattern in patterns for path in out.glob(pattern)})
    if found and not overwrite:
        names = ", ".join(path.name for path in found)
        raise ValueError(
            f"--out {out}: there is {names} already; choose another folder, or replace it with --overwrite"
        )
    for path in found:
        path.unlink()

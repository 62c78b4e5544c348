"""``hetero-ppo report``: an HTML report of finished or running runs, and the before/after summary of a PPO run."""

from __future__ import annotations

import argparse
from pathlib import Path


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "report", help="write an HTML report of one or more runs: curves, before and after, samples, configuration"
    )
    parser.add_argument(
        "--run",
        dest="run_dirs",
        type=Path,
        action="append",
        required=True,
        metavar="DIR",
        help="a run's folder (or its metrics.jsonl); repeat it for more runs in one report, in the order of training",
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="HTML file (default: report.html in the last run's folder)"
    )
    parser.add_argument("--title", default=None, help="heading of the report")
    parser.add_argument(
        "--summary", action="store_true", help="also print the before/after table and samples of the last run (PPO)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the report, and print its path or a summary.

    Raises:
        ValueError: A folder has no metrics, a file is malformed, or the summary is of a run without evaluations.
    """
    # torch and matplotlib take seconds to import; `hetero-ppo --help` should not.
    from hetero_ppo.observability.report import build_report
    from hetero_ppo.observability.summary import REPORT_FILE, format_summary

    last: Path = args.run_dirs[-1]
    folder = last.parent if last.suffix == ".jsonl" else last
    out = build_report(args.run_dirs, args.out or folder / REPORT_FILE, args.title)
    if args.summary:
        print(format_summary(folder, out))
    else:
        print(f"report: {out}")

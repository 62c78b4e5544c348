"""Shared parts of the benchmarks: arguments, rounds, medians, and a report with one line of JSON for programs.

A benchmark builds its parser with ``parser``, measures with ``alternate`` or ``median_seconds``, and ends with ``report``. So every
benchmark has ``--json FILE``, and the last line that it prints is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

#: Environment of a process that is the only rank of its world.
ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
ONE_RANK |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def parser(description: str | None, *, rounds: int | None = None, num_warm_up: int = 0) -> argparse.ArgumentParser:
    """Build the parser of a benchmark, with ``--json`` and, where it repeats its measurements, ``--rounds``.

    Args:
        description: Docstring of the benchmark.
        rounds: Default of ``--rounds``, or None for a benchmark without rounds.
        num_warm_up: Number of rounds that run first and do not count, for the help text.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the JSON object to this file too")
    if rounds is not None:
        warm_up = f", after {num_warm_up} for warm-up" if num_warm_up else ""
        made.add_argument("--rounds", type=int, default=rounds, help=f"number of rounds that count{warm_up}")
    return made


def settings(args: argparse.Namespace, *, without: Sequence[str] = ()) -> dict[str, Any]:
    """Return the arguments as JSON values, less ``--json`` and those that are named."""
    kept = {name: value for name, value in vars(args).items() if name not in ("json", *without)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}


@contextmanager
def one_rank() -> Iterator[None]:
    """Set the environment of a world of one rank, and restore the old one at the end."""
    before = dict(os.environ)
    os.environ.update(ONE_RANK)
    try:
        yield
    finally:
        for name in ONE_RANK:
            del os.environ[name]
        os.environ.update({name: before[name] for name in ONE_RANK if name in before})


def alternate(
    contenders: Mapping[str, Callable[[int], Result]],
    rounds: int,
    *,
    num_warm_up: int = 0,
    on_result: Callable[[int, str, Result], None] | None = None,
) -> dict[str, list[Result]]:
    """Call every contender once per round, so that a change of the machine's speed affects all of them.

    Args:
        contenders: What to measure, by name. Each is called with the number of the round, warm-up included.
        rounds: Number of rounds that count.
        num_warm_up: Number of rounds before them whose results are dropped.
        on_result: Called with round, name and result after every measurement.

    Returns:
        The results of each contender, in the order of the rounds.
    """
    results: dict[str, list[Result]] = {name: [] for name in contenders}
    for number in range(num_warm_up + rounds):
        for name, measure in contenders.items():
            result = measure(number)
            if number >= num_warm_up:
                results[name].append(result)
            if on_result is not None:
                on_result(number, name, result)
    return results


def median_seconds(work: Callable[[], object], repeats: int, *, settle: Callable[[], object] = lambda: None) -> float:
    """Return the median wall seconds of one call.

    Args:
        work: Function that is timed.
        repeats: Number of calls.
        settle: Function that waits for what a call left running, such as a device; its time counts.
    """
    seconds = []
    for _ in range(repeats):
        settle()
        start = time.perf_counter()
        work()
        settle()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the ratios within each round, which a machine that slows down between rounds does not change."""
    return statistics.median(one / other for one, other in zip(numerators, denominators, strict=True))


def report(
    benchmark: str, figures: Mapping[str, Any], file: Path | None, *, text: str = "", details: Mapping[str, Any] = {}
) -> None:
    """Print the result, for people and then for programs: the last line is one JSON object.

    Args:
        benchmark: Name of the benchmark.
        figures: What was measured.
        file: File that the figures are written to, or None.
        text: Table for people.
        details: What the file has beside the figures.
    """
    whole = {"benchmark": benchmark, **figures}
    if file is not None:
        write_json(file, {**whole, **details})
    if text:
        print(f"\n{text}\n")
    print(json.dumps(whole), flush=True)


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file at once: a reader sees the whole of the old file or of the new one."""
    partial = file.with_name(file.name + ".tmp")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.rename(file)

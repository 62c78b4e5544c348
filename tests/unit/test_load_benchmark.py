"""The figures of the load benchmark: they see what grows, and which rows are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import load


def samples(leak_per_step: int, fds_per_step: int = 0) -> list[load.Usage]:
    """Return the usage of 60 steps. The first five allocate what stays, and garbage makes a saw tooth of 40 MiB."""

    def one(step: int) -> load.Usage:
        noise = (step % 7) * 40 * load.MIB
        rank = 500 * load.MIB + min(step, 5) * 100 * load.MIB + step * leak_per_step + noise
        return load.Usage(
            step, {"rank": rank, "engine": 300 * load.MIB}, {"rank": 50 + step * fds_per_step}, {"rank": 9, "engine": 4}
        )

    return [one(step) for step in range(1, 61)]


def test_a_leak_is_seen_through_a_warm_up_and_garbage() -> None:
    flat, leaking = (load.figures_of(samples(leak), warm_up=12) for leak in (0, load.MIB))
    assert abs(flat["rss_growth_mb_per_100_steps"]) < 40  # 40 MiB to and fro
    assert abs(leaking["rss_growth_mb_per_100_steps"] - flat["rss_growth_mb_per_100_steps"] - 100) < 0.01
    assert leaking["rss_growth_by_process"]["engine"] == 0 and leaking["rss_mb"]["engine"] == 300
    assert flat["fd_growth"] == flat["thread_growth"] == 0
    assert load.figures_of(samples(0, fds_per_step=1), warm_up=12)["fd_growth"] == 44


def test_rows_that_are_missing_twice_or_short_are_lost(tmp_path: Path) -> None:
    def dump(*rows: tuple[int, int]) -> Path:
        path = tmp_path / "step_000001.jsonl"
        path.write_text(
            "".join(json.dumps({"prompt_index": index, "response_ids": [1] * length}) + "\n" for index, length in rows)
        )
        return path

    full = load.RESPONSE_TOKENS
    assert load.lost_rows(dump(*((index, full) for index in range(4))), 4) == 0
    assert load.lost_rows(dump(*((index, full) for index in range(3))), 4) == 1
    assert load.lost_rows(dump((0, full), (0, full), (1, full), (2, full)), 4) == 1
    assert load.lost_rows(dump((0, full), (1, full), (2, full), (3, full - 1)), 4) == 1
    assert load.lost_rows(dump(*((index, full) for index in range(4)), (0, full)), 4) == 1


def test_the_counts_are_those_of_living_processes() -> None:
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(7)]
    child = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=held,
    )
    try:
        assert child.stdout is not None and child.stdout.readline()
        found = load.usage(SimpleNamespace(left=lambda: [child.pid, 2**22 - 1]), step=3)
        assert found.step == 3 and found.fds == {"other": 3 + 7} and found.threads == {"other": 1}
        assert 2**20 < found.rss["other"] < 2**28
    finally:
        child.communicate(b"\n")
        for descriptor in held:
            os.close(descriptor)


def test_the_warm_up_is_a_tenth_of_the_steps_or_what_is_asked_for() -> None:
    assert load.parse_args([]).warm_up == 20 and load.parse_args(["--steps", "8"]).warm_up == 3
    assert load.parse_args(["--warm-up", "5"]).warm_up == 5


def test_prompts_of_two_epochs_are_refused() -> None:
    with pytest.raises(SystemExit):
        load.parse_args(["--prompts", "100", "--rows", "30"])

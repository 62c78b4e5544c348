"""Reward functions in worker processes: a judge that waits, with one worker and with many, and the cost of a call.

python benchmarks/reward_workers.py --rows 512 --judge-s 0.5 --workers 16 --json reward_workers.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from hetero_ppo.reward.function_pool import FunctionPool, FunctionSpec
from hetero_ppo.reward.function_worker import load_function

#: What is called. The judge waits for something else, as one behind HTTP does.
FUNCTIONS = """
import asyncio, time

def judge(prompt, response, label, metadata):
    time.sleep(label)
    return 1.0

async def async_judge(prompt, response, label, metadata):
    await asyncio.sleep(label)
    return 1.0

def empty(prompt, response, label, metadata):
    return 1.0

def empty_batch(prompts, responses, labels, metadata):
    return [1.0] * len(prompts)
"""
#: Characters of a prompt and of a response.
TEXT = "word " * 100
EMPTY_CALLS, BATCH = 5_000, 64


def measure(rows: int, judge_s: float, workers: int) -> dict[str, Any]:
    """Time the judge in one worker, in ``workers`` and as ``async def``, and an empty function in a worker and in this process.

    Args:
        rows: Number of responses that the judge scores.
        judge_s: Seconds that the judge needs for one.
        workers: Number of worker processes.

    Returns:
        ``judge_s_<n>_workers``, ``judge_s_async``: seconds from the first call to the last score, the workers' start included.
        ``empty_calls_per_s_*``: responses per second. ``worker_start_s``, ``worker_rss_mib``: of one worker with an empty module.
    """
    found: dict[str, Any] = {"rows": rows, "judge_s": judge_s, "workers": workers}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "functions.py")
        file.write_text(FUNCTIONS)
        row = [TEXT, TEXT, judge_s, {}]
        for name, function, count in (
            ("1_workers", "judge", 1),
            (f"{workers}_workers", "judge", workers),
            ("async", "async_judge", None),
        ):
            found[f"judge_s_{name}"] = _seconds(file, function, [row] * rows, workers=count)
        calls = [[TEXT, TEXT, None, {}]] * EMPTY_CALLS
        found["empty_calls_per_s_worker"] = EMPTY_CALLS / _seconds(file, "empty", calls, workers=1)
        found["empty_calls_per_s_batch"] = EMPTY_CALLS / _seconds(file, "empty_batch", calls, workers=1, batch=BATCH)
        empty = load_function(f"{file}:empty", "benchmark")
        start = time.perf_counter()
        for call in calls:
            empty(*call)
        found["empty_calls_per_s_in_process"] = EMPTY_CALLS / (time.perf_counter() - start)
        found |= _worker(file)
    return found


def _seconds(file: Path, name: str, calls: list[list[Any]], *, workers: int | None, batch: int | None = None) -> float:
    """Seconds of all calls."""
    pool = FunctionPool(FunctionSpec(f"{file}:{name}", "benchmark", 60.0, workers, batch))
    pool.open()
    pool.loaded()
    try:
        start = time.perf_counter()
        if batch is None:
            ticket = pool.submit([(call, (row,)) for row, call in enumerate(calls)], len(calls))
        else:
            parts = [range(first, min(first + batch, len(calls))) for first in range(0, len(calls), batch)]
            columns = [list(column) for column in zip(*calls, strict=True)]
            ticket = pool.submit(
                [([[column[row] for row in part] for column in columns], part) for part in parts], len(calls)
            )
        while not ticket.wait(60.0, until_failure=True):
            pass
        seconds = time.perf_counter() - start
        assert set(ticket.outcomes) == {1.0}, ticket.outcomes
        return seconds
    finally:
        pool.close()


def _worker(file: Path) -> dict[str, float]:
    """Start and memory of one worker."""
    start = time.perf_counter()
    pool = FunctionPool(FunctionSpec(f"{file}:empty", "benchmark", 60.0, 1))
    pool.open()
    pool.loaded()
    seconds = time.perf_counter() - start
    (process,) = pool.processes()
    status = Path(f"/proc/{process}/status").read_text()
    rss_kib = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
    pool.close()
    return {"worker_start_s": seconds, "worker_rss_mib": rss_kib / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512, help="responses that the judge scores")
    parser.add_argument("--judge-s", type=float, default=0.5, help="seconds that the judge needs for one")
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--json", type=Path, help="file for the JSON object as well")
    args = parser.parse_args()
    result = measure(args.rows, args.judge_s, args.workers)
    for name, value in result.items():
        print(f"{name:32} {value:12.2f}")
    line = json.dumps(result)
    if args.json is not None:
        args.json.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()

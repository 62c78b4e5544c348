"""Time reward functions in worker processes: a function that waits, with one worker and with many, and the cost of one call.

python benchmarks/reward_workers.py --rows 512 --call-s 0.5 --workers 16 --json reward_workers.json
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import harness

from hetero_ppo.reward.function_pool import FunctionPool, FunctionSpec
from hetero_ppo.reward.function_worker import load_function
from hetero_ppo.table import render_table

#: The functions that are called. ``waiting`` waits, as a function does that asks a server.
FUNCTIONS = """
import asyncio, time

def waiting(prompt, response, label, metadata):
    time.sleep(label)
    return 1.0

async def async_waiting(prompt, response, label, metadata):
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


def measure(rows: int, call_s: float, workers: int) -> dict[str, Any]:
    """Time a waiting function in one worker, in ``workers`` and as ``async def``, and an empty one in a worker and in this process.

    Args:
        rows: Number of responses that the waiting function scores.
        call_s: Seconds that it waits for each.
        workers: Number of worker processes.

    Returns:
        ``waiting_s_<n>_workers``, ``waiting_s_async``: seconds from the first call to the last score.
        ``empty_calls_per_s_*``: responses per second. ``worker_start_s``, ``worker_rss_mib``: start and memory of one worker with an empty
        module.
    """
    found: dict[str, Any] = {"rows": rows, "call_s": call_s, "workers": workers}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "functions.py")
        file.write_text(FUNCTIONS)
        row = [TEXT, TEXT, call_s, {}]
        for name, function, count in (
            ("1_workers", "waiting", 1),
            (f"{workers}_workers", "waiting", workers),
            ("async", "async_waiting", None),
        ):
            found[f"waiting_s_{name}"] = _seconds(file, function, [row] * rows, workers=count)
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
    """Return the seconds of all calls."""
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
    """Measure the start and the memory of one worker."""
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
    parser = harness.parser(__doc__)
    parser.add_argument("--rows", type=int, default=512, help="number of responses that the waiting function scores")
    parser.add_argument("--call-s", type=float, default=0.5, help="seconds that it waits for each")
    parser.add_argument("--workers", type=int, default=16, help="number of worker processes")
    args = parser.parse_args()
    result = measure(args.rows, args.call_s, args.workers)
    rows = [[name, f"{value:.2f}"] for name, value in result.items()]
    harness.report("reward_workers", result, args.json, text=render_table(rows, "lr"))


if __name__ == "__main__":
    main()

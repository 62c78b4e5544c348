"""Runs the jobs of a worker one after the other, and writes what every rank saw of each into one file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hetero_ppo.distributed.groups import finish, initialise


def run_jobs(run_job: Callable[[dict[str, Any]], Any]) -> None:
    """Run the jobs of ``WORKER.py JOBS.json RESULTS.json``. Jobs: name -> job. Results: name -> what ``run_job`` returned on each rank."""
    torch.set_num_threads(1)
    initialise(timeout_minutes=2)
    results = {}
    for name, job in json.loads(Path(sys.argv[1]).read_text()).items():
        seen: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(seen, run_job(job))
        results[name] = seen
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    finish()

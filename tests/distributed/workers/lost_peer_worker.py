"""Rank 1 ends, or does not come, while rank 0 waits for it in a collective of a role; rank 0 prints what it says then, and when."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from hetero_ppo.config.schema import ParallelConfig
from hetero_ppo.distributed.groups import initialise, role_groups
from hetero_ppo.distributed.lost_peer import describe_lost_peer
from hetero_ppo.observability.timers import PhaseTimer
from hetero_ppo.observability.watchdog import Watchdog

DEADLINE_S = 2.0

what, reported = sys.argv[1], Path(sys.argv[2])
initialise(DEADLINE_S / 60)
groups = role_groups("critic", ParallelConfig())
dist.barrier()
if dist.get_rank() == 1:
    until = time.monotonic() + 60
    while what == "late" and not reported.exists() and time.monotonic() < until:
        time.sleep(0.05)
    os._exit(0)
with Watchdog(reported.parent, 0, None) as watchdog:
    start = time.monotonic()
    try:
        with PhaseTimer(watchdog=watchdog).phase("train_critic"):
            dist.all_reduce(torch.ones(1), group=groups.dp)
    except RuntimeError as error:
        print(time.monotonic() - start, describe_lost_peer(error, watchdog.failed_in, DEADLINE_S / 60), flush=True)
reported.touch()
os._exit(0)

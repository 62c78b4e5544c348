from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from hetero_ppo.errors import EXIT_STUCK
from hetero_ppo.observability.timers import PhaseTimer
from hetero_ppo.observability.watchdog import Watchdog

STUCK = """
import sys, time
from pathlib import Path
from hetero_ppo.observability.timers import PhaseTimer
from hetero_ppo.observability.watchdog import Watchdog

def never_ends():
    time.sleep(60)

with Watchdog(Path(sys.argv[1]), 3, 0.3, peers_dump_s=0.0) as watchdog:
    timer = PhaseTimer(watchdog=watchdog)
    with timer.phase("experience"), timer.phase("values"):
        never_ends()
"""


def test_a_stuck_phase_ends_the_process_and_leaves_the_stacks(tmp_path: Path) -> None:
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", STUCK, str(tmp_path)], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == EXIT_STUCK, done.stderr
    assert time.monotonic() - start < 30
    assert "error: rank 3 is stuck in phase experience/values" in done.stderr
    assert "run.phase_timeout_minutes" in done.stderr
    stacks = (tmp_path / "stacks_rank3.txt").read_text()
    assert stacks.startswith("rank 3, phase experience/values\n") and "never_ends" in stacks


HOLDS_THE_GIL = """
import re, sys
from pathlib import Path
from hetero_ppo.observability.watchdog import Watchdog

def never_gives_it_back():
    re.match(r"(a|aa)+$", "a" * 60 + "b")

with Watchdog(Path(sys.argv[1]), 3, 0.2, peers_dump_s=0.1, gil_s=0.2) as watchdog:
    watchdog.note("experience")
    never_gives_it_back()
"""


def test_a_thread_that_holds_the_gil_is_ended_too(tmp_path: Path) -> None:
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HOLDS_THE_GIL, str(tmp_path)], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 1 and time.monotonic() - start < 30
    assert "Timeout (" in done.stderr and "in never_gives_it_back" in done.stderr


def test_progress_inside_a_phase_counts(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 0.4) as watchdog:
        watchdog.note("experience")
        for _ in range(5):
            time.sleep(0.15)
            watchdog.progress()
        watchdog.note("")
        watchdog.progress()
        time.sleep(0.5)
    assert not list(tmp_path.iterdir())


def test_phases_that_get_on_and_time_outside_of_them_do_not_count(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 0.4) as watchdog:
        timer = PhaseTimer(watchdog=watchdog)
        time.sleep(0.6)
        with timer.phase("rollout"):
            for _ in range(4):  # longer than the limit as a whole
                with timer.phase("chunk"):
                    time.sleep(0.15)
        time.sleep(0.6)
    assert not list(tmp_path.iterdir())


def test_without_a_limit_nothing_watches(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, None) as watchdog:
        watchdog.note("rollout")

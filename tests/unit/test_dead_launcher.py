"""A launcher that is killed cannot end its ranks: they see it, and end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from hetero_ppo.trainers.stopping import LOOK_S

RANK = """
import os, pathlib, sys, time
from hetero_ppo.trainers.stopping import StopRequests

with StopRequests(60.0):
    pathlib.Path(sys.argv[1]).with_name("rank.tmp").write_text(str(os.getpid()))
    pathlib.Path(sys.argv[1]).with_name("rank.tmp").rename(sys.argv[1])
    time.sleep(120)  # as in a collective, or in a wait for the engine
"""


def test_ranks_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    program, there = tmp_path / "program.py", tmp_path / "rank"
    program.write_text(RANK)
    command = [sys.executable, "-m", "hetero_ppo.cli.launcher", "--standalone", "--nproc-per-node", "1", str(program), str(there)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as launcher:
        until = time.monotonic() + 60
        while not there.exists():
            assert launcher.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        rank = int(there.read_text())
        launcher.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        text = launcher.stderr.read()  # until the rank has closed it, too
        assert time.monotonic() - killed < LOOK_S + 10
    assert "error: the launcher has ended without its ranks" in text
    assert not Path(f"/proc/{rank}/cmdline").exists() or not Path(f"/proc/{rank}/cmdline").read_bytes()

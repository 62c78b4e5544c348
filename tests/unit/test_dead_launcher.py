"""Launchers that are killed, and ones whose terminal is closed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hetero_ppo.trainers.stopping import LOOK_S

RANK = """
import os, pathlib, sys, time
from hetero_ppo.trainers.stopping import StopRequests

with StopRequests(60.0):
    pathlib.Path(sys.argv[1]).with_name("rank.tmp").write_text(str(os.getpid()))
    pathlib.Path(sys.argv[1]).with_name("rank.tmp").rename(sys.argv[1])
    time.sleep(120)  # as in a collective, or in a wait for the engine
"""


STOPPABLE = """
import pathlib, sys, time
from hetero_ppo.trainers.stopping import StopRequests

with StopRequests(60.0) as stop:
    pathlib.Path(sys.argv[1]).touch()
    while not stop.is_requested:
        time.sleep(0.01)
    sys.exit(75)
"""


@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_closed_terminal_asks_for_a_stop_unless_the_run_was_started_with_nohup(
    tmp_path: Path, is_ignored: bool
) -> None:
    program, there = tmp_path / "program.py", tmp_path / "rank"
    program.write_text(STOPPABLE)
    nohup = ["nohup"] if is_ignored else []
    command = [
        *nohup,
        sys.executable,
        "-m",
        "hetero_ppo.cli.launcher",
        "--standalone",
        "--nproc-per-node",
        "1",
        str(program),
        str(there),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    # What has a handler is the default in a new process, also where the tests themselves run under nohup.
    previous = signal.signal(signal.SIGHUP, lambda number, frame: None)
    with subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as launcher:
        signal.signal(signal.SIGHUP, previous)
        until = time.monotonic() + 60
        while not there.exists():
            assert launcher.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        launcher.send_signal(signal.SIGHUP)
        if is_ignored:
            (rank,) = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
            os.kill(int(rank), signal.SIGHUP)
            time.sleep(0.5)
            assert launcher.poll() is None
            launcher.send_signal(signal.SIGTERM)
        text = launcher.communicate(timeout=60)[1]
    assert launcher.returncode == 75 and "SIGUSR1: the run stops with a checkpoint" in text, text


def test_ranks_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    program, there = tmp_path / "program.py", tmp_path / "rank"
    program.write_text(RANK)
    command = [
        sys.executable,
        "-m",
        "hetero_ppo.cli.launcher",
        "--standalone",
        "--nproc-per-node",
        "1",
        str(program),
        str(there),
    ]
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

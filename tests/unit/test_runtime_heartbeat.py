"""Real ranks under the real launcher: stopped, frozen in C code with the GIL held, and left alone when they live."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hetero_ppo.errors import EXIT_STUCK
from hetero_ppo.runtime import heartbeat
from hetero_ppo.runtime.heartbeat import HeartbeatMonitor

RANK = """
import os, pathlib, re, signal, sys, time
from hetero_ppo.observability.timers import PhaseTimer
from hetero_ppo.observability.watchdog import Watchdog
from hetero_ppo.runtime.heartbeat import Heartbeat

rank = int(os.environ["RANK"])
kind, there = sys.argv[1 + rank], sys.argv[3]

def never_returns():
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "gil":
        re.match(r"(a+)+$", "a" * 64 + "b")  # C code that holds the GIL for ages
    time.sleep(120)

with Heartbeat(4.0) as beats, Watchdog(pathlib.Path("."), 0, None, on_phase=beats.note) as watchdog:
    assert beats.is_monitored
    pathlib.Path(f"{there}{rank}").touch()
    while not pathlib.Path(f"{there}{1 - rank}").exists():
        time.sleep(0.01)
    with PhaseTimer(watchdog=watchdog).phase("values"):
        never_returns()
"""


@contextmanager
def launched(tmp_path: Path, *kinds: str) -> Iterator[subprocess.Popen[str]]:
    program = tmp_path / "program.py"
    program.write_text(RANK)
    command = [sys.executable, "-m", "hetero_ppo.cli.launcher", "--standalone", "--nproc-per-node", "2", str(program)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, *kinds, str(tmp_path / "rank")], env=env, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_silent_ranks_end_the_run(tmp_path: Path) -> None:
    with launched(tmp_path, "gil", "stop") as launcher:
        _, text = launcher.communicate(timeout=90)
    assert launcher.returncode == EXIT_STUCK, text
    lines = sorted(line for line in text.splitlines() if line.startswith("error: "))
    assert len(lines) == 2 and all(
        "(run.heartbeat_timeout_s), in phase values; its state is " in line for line in lines
    ), text
    assert lines[0].startswith("error: rank 0 on ") and "R (runs)" in lines[0]
    assert "in never_returns" in text.partition("error: ")[0]
    assert lines[1].startswith("error: rank 1 on ") and "T (stopped)" in lines[1] and "SIGCONT" in lines[1]


def test_a_launcher_that_was_stopped_with_its_ranks_ends_nothing(tmp_path: Path) -> None:
    """All are stopped for longer than the deadline and go on, as scontrol suspend does it."""
    with launched(tmp_path, "lives", "lives") as launcher:
        until = time.monotonic() + 60
        while not all((tmp_path / f"rank{rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < until
            time.sleep(0.02)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        everyone = [*map(int, children), launcher.pid]
        for pid in everyone:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(5.0)
        for pid in reversed(everyone):  # the launcher wakes before its ranks
            os.kill(pid, signal.SIGCONT)
        time.sleep(2.5)
        assert launcher.poll() is None
        launcher.send_signal(signal.SIGINT)
        _, text = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGINT and "sign of life" not in text, text


def test_a_rank_that_is_debugged_or_has_ended_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = HeartbeatMonitor()
    monkeypatch.setenv("RANK", "3")
    heartbeat.HEADER.pack_into(monitor._memory, 0, 1, 3.0, os.getpid(), 3)
    assert monitor.find_silent() == {}
    clock = monitor._clocks[0][1]
    for state, found in (("t (stopped by a debugger)", []), ("Z (ended)", []), ("D (waits)", [os.getpid()])):
        clock.silent_s = 10.0
        monkeypatch.setattr(heartbeat, "process_state", lambda pid, state=state: state)
        assert list(monitor.find_silent()) == found


def test_without_a_launcher_nothing_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(heartbeat.VARIABLE, "/proc/1/fd/3")  # of a launcher further up
    with heartbeat.Heartbeat(3.0) as beats:
        assert not beats.is_monitored
        beats.note("values")

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from hetero_ppo.observability.silence import SilenceClock, num_waits, process_state

SLEEPER = [sys.executable, "-I", "-S", "-c", "import time\nwhile True: time.sleep(0.01)"]


def test_silence_is_counted_while_the_value_stays() -> None:
    now = [100.0]
    clock = SilenceClock(3.0, now=lambda: now[0])
    found = []
    for value in (1, 1, 1, 2, 2):
        found.append(clock.look(value))
        now[0] += 1.0
    assert found == [0.0, 1.0, 2.0, 0.0, 1.0]


def test_a_gap_in_which_the_observer_did_not_run_counts_little() -> None:
    """A suspended machine, a stopped job: the observed one was stopped, too, and gets its time."""
    now = [0.0]
    clock = SilenceClock(3.0, now=lambda: now[0])
    clock.look(7)
    now[0] += 3600.0
    assert clock.look(7) == 3.0
    clock.reset()
    now[0] += 1.0
    assert clock.look(7) == 1.0


def test_states_and_waits_of_a_process() -> None:
    with subprocess.Popen(SLEEPER) as process:
        first = num_waits(process.pid)
        until = time.monotonic() + 20
        while num_waits(process.pid) == first:
            assert time.monotonic() < until
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        stopped = num_waits(process.pid)
        assert process_state(process.pid) == "T (stopped)"
        time.sleep(0.1)
        assert num_waits(process.pid) == stopped
        process.kill()
    assert process_state(process.pid) is None and num_waits(process.pid) is None

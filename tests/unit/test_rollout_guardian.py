"""The guardian process: no child outlives the trainer, and a child's end is reported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from hetero_ppo.rollout.servers import guardian

#: A server whose helper process stays behind when the server is killed, and that ignores SIGTERM.
STUBBORN = "trap '' TERM; sleep 300 & wait; wait"


def start(directory: Path, *command: str, grace_s: float = 0.3) -> tuple[subprocess.Popen[str], int]:
    """Start a guardian. Return it, and the process group of its child."""
    argv = [
        sys.executable,
        "-I",
        guardian.__file__,
        str(os.getpid()),
        str(grace_s),
        str(directory),
        "-1",
        "--",
        *command,
    ]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


def group_is_gone(group: int, timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def wait_for_helper(group: int) -> None:
    """Wait until the shell has started its helper."""
    while len(Path(f"/proc/{group}/task/{group}/children").read_text().split()) == 0:
        time.sleep(0.01)


def test_a_return_code_is_handed_on(tmp_path: Path) -> None:
    process, _ = start(tmp_path, "sh", "-c", "exit 3")
    assert process.wait(5) == 3
    process.stdout.close()


def test_a_killed_child_takes_its_helpers_along(tmp_path: Path) -> None:
    process, group = start(tmp_path, "sh", "-c", STUBBORN)
    wait_for_helper(group)
    os.kill(group, signal.SIGKILL)
    assert process.wait(5) == 128 + signal.SIGKILL
    assert group_is_gone(group) and tmp_path.exists()
    process.stdout.close()


def test_sigterm_is_forwarded_and_then_enforced(tmp_path: Path) -> None:
    process, group = start(tmp_path, "sh", "-c", STUBBORN)
    wait_for_helper(group)
    process.terminate()
    assert process.wait(5) == 128 + signal.SIGKILL and group_is_gone(group)
    process.stdout.close()
    process, group = start(tmp_path, "sh", "-c", "trap 'exit 0' TERM; sleep 300 & wait", grace_s=20.0)
    wait_for_helper(group)
    process.terminate()
    assert process.wait(5) == 0 and group_is_gone(group)
    process.stdout.close()


def test_a_killed_trainer_leaves_nothing(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir()
    trainer = (
        "import os, subprocess, sys, time\n"
        f"argv = [sys.executable, '-I', {guardian.__file__!r}, str(os.getpid()), '0.3', {str(private)!r}, '-1', '--']\n"
        f"guard = subprocess.Popen(argv + ['sh', '-c', {STUBBORN!r}], stdout=subprocess.PIPE, text=True, start_new_session=True)\n"
        "print(guard.pid, guard.stdout.readline(), flush=True)\n"
        "time.sleep(300)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", trainer], stdout=subprocess.PIPE, text=True)
    guard, group = map(int, process.stdout.readline().split())
    wait_for_helper(group)
    process.kill()
    process.wait()
    assert group_is_gone(group) and group_is_gone(guard)
    assert not private.exists()
    process.stdout.close()


def test_a_killed_guardian_takes_the_server_along(tmp_path: Path) -> None:
    process, group = start(tmp_path, "sleep", "300")
    process.kill()
    process.wait()
    assert group_is_gone(group)
    process.stdout.close()

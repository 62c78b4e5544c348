"""Runs one rollout server and ends it with the trainer, however the trainer ends.

It is a script, ``python guardian.py TRAINER_PID GRACE_S DIR LISTEN_FD -- COMMAND...``, which imports only the standard library and starts in
milliseconds. It starts COMMAND in a new process group and prints the group's id on stdout. Then:

- When COMMAND ends, it kills what is left of the group and ends with COMMAND's return code (128 + n for a signal n). A killed
  API server would otherwise leave vLLM's EngineCore process running.
- On SIGTERM it asks COMMAND to stop, and kills the group after GRACE_S seconds.
- When the trainer is gone, even by SIGKILL, it kills the group at once and removes DIR (sockets and weights of this run).
- It hands the socket LISTEN_FD to COMMAND (-1: there is none), and refuses clients there when COMMAND has ended. The trainer keeps the
  port for the next start.

The guardian notices the trainer's death because its own parent changes. A pipe would not do: a process that the trainer forked (a data-loader
worker) keeps it open. PR_SET_PDEATHSIG on the guardian would not do either: it fires when the *thread* that started it ends. COMMAND
itself gets PR_SET_PDEATHSIG, because the guardian has one thread.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

POLL_S = 0.1
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def _die_with_parent() -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def kill_group(group: int) -> None:
    """Send SIGKILL to every process of a group. A group that is gone is no error."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


def processes_of(group: int) -> list[int]:
    """Return the process ids of a group."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.getpgid(int(name)) == group:
                    found.append(int(name))
            except ProcessLookupError:
                continue  # it has ended meanwhile
    return found


def _reap_orphans() -> None:
    """Wait for the killed processes that became this process' children when their parent died."""
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


class _StopAsked(Exception):
    """SIGTERM arrived."""


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    raise _StopAsked


def _watch(child: subprocess.Popen[bytes], trainer: int, private_dir: str) -> None:
    """Return when the child has ended, by itself or because the trainer is gone."""
    while child.poll() is None:
        if os.getppid() != trainer:
            kill_group(child.pid)
            child.wait()
            shutil.rmtree(private_dir, ignore_errors=True)  # other servers' guardians remove it too
            return
        time.sleep(POLL_S)


def _close_to_clients(listener: socket.socket) -> None:
    """Close a socket to clients, as ``hetero_ppo.network.stop_listening`` does, which this script cannot import."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    if listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):  # else the server has done it
        listener.shutdown(socket.SHUT_RDWR)


def main(argv: list[str]) -> int:
    trainer, grace_s, private_dir, listen_fd, separator = int(argv[0]), float(argv[1]), argv[2], int(argv[3]), argv[4]
    if separator != "--":
        raise ValueError("guardian.py TRAINER_PID GRACE_S DIR LISTEN_FD -- COMMAND...")
    inherited = () if listen_fd < 0 else (listen_fd,)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, _on_sigterm)
    # Both of its streams go to the log, which is this process' stderr. (preexec_fn: there is one thread here.)
    child = subprocess.Popen(
        argv[5:], stdout=sys.stderr, start_new_session=True, preexec_fn=_die_with_parent, pass_fds=inherited  # noqa: PLW1509
    )  # fmt: skip
    try:
        print(child.pid, flush=True)
        _watch(child, trainer, private_dir)
    except _StopAsked:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child.terminate()
        try:
            child.wait(timeout=grace_s)
        except subprocess.TimeoutExpired:
            pass
    finally:
        kill_group(child.pid)
        child.wait()
        _reap_orphans()
        for descriptor in inherited:
            _close_to_clients(socket.socket(fileno=descriptor))
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

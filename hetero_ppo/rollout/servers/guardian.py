"""Stands between the trainer and one rollout server, so that the server never outlives the trainer.

Run as a script, ``python guardian.py TRAINER_PID GRACE_S DIR LISTEN_FD -- COMMAND...``, with the standard library alone (it starts in
milliseconds). It starts COMMAND in a process group of its own, prints the group's id on stdout, and then

- ends with COMMAND's return code (128 + n for a signal n) when COMMAND ends, after killing what is left of its group: a killed
  API server would otherwise leave vLLM's EngineCore process running;
- on SIGTERM, asks COMMAND to stop, and kills the group when it has not within GRACE_S seconds;
- when the trainer is gone, SIGKILL included, kills the group at once and removes DIR (sockets and weights of this run);
- passes the socket LISTEN_FD on to COMMAND (-1: there is none), and closes it to clients when COMMAND has ended: the trainer keeps its
  port for the next start, and clients are refused until then.

The trainer's death is seen by this process' parent changing. A pipe that closes would do as well, except that a process forked
by the trainer (a data-loader worker) keeps it open; PR_SET_PDEATHSIG on this process would fire when the *thread* that started
it ends. The command itself does get PR_SET_PDEATHSIG: this process has one thread.
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
    """SIGKILL to every process of a group; a group that is gone is no error."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


def processes_of(group: int) -> list[int]:
    """Processes of a group."""
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
    """Waits for the killed processes that became this process' children when their parent died."""
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
    """Returns when the child has ended, by itself or because the trainer is gone."""
    while child.poll() is None:
        if os.getppid() != trainer:
            kill_group(child.pid)
            child.wait()
            shutil.rmtree(private_dir, ignore_errors=True)  # other servers' guardians remove it too
            return
        time.sleep(POLL_S)


def _close_to_clients(listener: socket.socket) -> None:
    """As ``hetero_ppo.network.stop_listening``, which a script with the standard library alone cannot import."""
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

"""Fork launchers and ranks from a process that has imported everything, where other runs start interpreters.

Importing is most of a tiny run's time. Everything else stays the same: the launcher is torchrun's, its ranks are its children in their own
sessions, and servers are started as programs. Only one run goes at a time: all descendants of the benchmark's process belong to it.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from faults_run import ROOT, RUNS, Run

#: Constant of Linux's prctl.h.
PR_SET_CHILD_SUBREAPER = 36
#: Descriptors below this number are closed in a new process: they belong to the process that it was forked from.
MAX_DESCRIPTORS = 4096
POLL_S = 0.01
#: Signals that the launcher or the benchmark handles.
HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT)


class ForkedProcess:
    """A forked process with the methods of ``subprocess.Popen`` that torchrun and the benchmark use."""

    def __init__(self, function: Callable[[], int], env: Mapping[str, str], log: Path | None) -> None:
        """Start the process.

        Args:
            function: Function that the new process runs; it returns the exit status.
            env: Environment of the new process.
            log: File of its output, or None for the output of this process.
        """
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                _become(env, log)
                status = function()
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1
            except BaseException:  # noqa: BLE001  as an interpreter does at its top
                traceback.print_exc()
            finally:
                threading._shutdown()
                atexit._run_exitfuncs()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)

    def poll(self) -> int | None:
        """Return the exit status, -n for signal n, or None while the process runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the process. Return its exit status."""
        until = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired("forked process", timeout)
            time.sleep(POLL_S)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def _become(env: Mapping[str, str], log: Path | None) -> None:
    """Drop what belongs to the process that this one was forked from."""
    os.setsid()
    for number in HANDLED:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.set_wakeup_fd(-1)
    atexit._clear()
    weakref.finalize._registry.clear()
    weakref.finalize._registered_with_atexit = False
    if log is not None:
        out = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.closerange(3, MAX_DESCRIPTORS)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)


def _launch(arguments: list[str]) -> int:
    """Run the launcher as ``python -m hetero_ppo.cli.launcher`` does, with forked ranks."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    from hetero_ppo.cli import launcher

    def start_rank(handler: SubprocessHandler, command: tuple[str, ...], env: dict[str, str]) -> ForkedProcess:
        program = list(command[command.index("-u") + 1 :])
        return ForkedProcess(lambda: _rank(program), env, None)

    SubprocessHandler._popen = start_rank
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return launcher.main(arguments)


def _rank(program: list[str]) -> int:
    """Run the program of a rank as ``python -u`` does."""
    from faults_worker import Fault

    from hetero_ppo.cli.main import main

    if program[0] == "-m":
        return main(program[2:])
    Fault(**json.loads(program[1])).arm()
    return main(program[2:])


class ForkedRun(Run):
    """A launch by a fork. The run's processes are all new descendants of this one."""

    def _start(self, command: Sequence[str], env: Mapping[str, str]) -> Any:
        del command  # for an interpreter
        self.log.touch()
        self._known = set(_descendants(os.getpid()))  # of the benchmark itself
        return ForkedProcess(lambda: _launch(self.arguments), env, self.log)

    def left(self) -> list[int]:
        """Return the processes that still live, and reap those that have ended."""
        found = []
        for pid in set(_descendants(os.getpid())) - self._known:
            state = _state(pid)
            if state is None:
                continue
            if state != "Z":
                found.append(pid)
            elif pid != self.process.pid:
                try:
                    os.waitpid(pid, os.WNOHANG)
                except ChildProcessError:
                    continue  # its parent reaps it
        return found


def _state(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def _descendants(pid: int) -> list[int]:
    found = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *_descendants(int(child))]
    except (FileNotFoundError, ProcessLookupError):
        pass  # it has ended, and its children now belong to this process
    return found


def begin() -> type[Run]:
    """Import what runs need, and make this process the parent of orphaned descendants."""
    import faults_worker  # noqa: F401
    import hetero_ppo.cli.launcher
    import hetero_ppo.rollout.vllm
    import hetero_ppo.rollout.megatron
    import hetero_ppo.runtime.heartbeat
    import hetero_ppo.trainers.open_ppo
    import hetero_ppo.trainers.stopping  # noqa: F401

    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")
    gc.collect()
    gc.freeze()
    assert not RUNS
    return ForkedRun

"""One launch of the fault benchmark. A mark in the environment identifies all processes of it, so that they can be ended."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARK = "HETERO_PPO_FAULTS_MARK"
#: Seconds within which a run that met its fault must end, its start included.
BOUND_S = 150.0
#: Seconds from the end of the launcher to the end of all processes.
LEFT_S = 10.0

#: Every launch; the benchmark ends them all when it ends.
RUNS: list[Run] = []


class Run:
    """One launch, in its own session."""

    def __init__(
        self,
        program: Sequence[str],
        num_ranks: int,
        log: Path,
        *,
        file_limit: int | None = None,
        start: str = "",
        bound_s: float = BOUND_S,
        **variables: str,
    ) -> None:
        """Start the launcher.

        Args:
            program: Program that the launcher starts, with its arguments.
            num_ranks: Number of ranks, all on this machine.
            log: File of the output.
            file_limit: Size of the largest file that the run may write, in bytes.
            start: "nohup", "terminal" (a new one, see ``close_terminal``), or "".
            bound_s: Seconds until ``wait`` gives up.
            variables: Additional environment variables.
        """
        self.mark = uuid.uuid4().hex
        self.log = log
        self.bound_s = bound_s
        self.found_left: list[str] = []
        self.arguments = ["--standalone", "--nproc-per-node", str(num_ranks), *program]
        command = [sys.executable, "-m", "hetero_ppo.cli.launcher", *self.arguments]
        if file_limit is not None:
            command = ["prlimit", f"--fsize={file_limit}", *command]
        if start == "nohup":
            command = ["nohup", *command]
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
            MARK: self.mark,
        }
        self._terminal: int | None = None
        self.log.write_text("")
        self.started = time.monotonic()
        RUNS.append(self)
        self.process = (
            self._start(command, env | variables)
            if start != "terminal"
            else self._start_on_terminal(command, env | variables)
        )

    def _start(self, command: Sequence[str], env: Mapping[str, str]) -> Any:
        """Start the process of the launcher."""
        with self.log.open("a") as out:
            return subprocess.Popen(
                command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    def _start_on_terminal(self, command: Sequence[str], env: Mapping[str, str]) -> Any:
        """Start it on a new terminal that controls its session: the system sends SIGHUP when the terminal is closed."""
        self._terminal, theirs = os.openpty()
        process = subprocess.Popen(
            ["setsid", "--ctty", *command], cwd=ROOT, env=env, stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        threading.Thread(target=self._copy, args=(os.dup(self._terminal),), daemon=True).start()
        return process

    def _copy(self, terminal: int) -> None:
        """Copy the terminal's output to the log, until the terminal is closed."""
        with self.log.open("ab", buffering=0) as out:
            while self._terminal is not None:
                ready, _, _ = select.select([terminal], [], [], 0.05)
                try:
                    out.write(os.read(terminal, 4096) if ready else b"")
                except OSError:  # the other side has ended
                    break
        os.close(terminal)

    def close_terminal(self) -> None:
        """Close the terminal as a lost connection does; the system then sends SIGHUP."""
        assert self._terminal is not None
        terminal, self._terminal = self._terminal, None
        os.close(terminal)

    def ranks(self) -> list[int]:
        """Return the process ids of the ranks."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def left(self) -> list[int]:
        """Return the living processes that have the mark."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue  # gone meanwhile, or not ours
        return found

    def strike(self, number: int, to: str) -> None:
        """Send a signal to "launcher", "rank" (the first) or "all"."""
        pids = {"launcher": lambda: [self.process.pid], "rank": lambda: self.ranks()[:1], "all": self.left}[to]()
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue  # it ended with another one

    def wait(self) -> int | None:
        """Wait for the launcher. Return its exit status, or None when it ran past its bound."""
        try:
            return self.process.wait(timeout=max(1.0, self.started + self.bound_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> bool:
        """Kill the processes that are left after some seconds. Return True when there were none."""
        until = time.monotonic() + LEFT_S
        while self.left() and time.monotonic() < until:
            time.sleep(0.1)
        left = self.left()
        self.found_left = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode() for pid in left]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        return not left

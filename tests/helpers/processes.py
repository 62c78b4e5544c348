"""Finds what a run has started, and what it has left, by the mark in the environment of all of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.chain import MARK, ROOT, environment, launch_command

PRIVATE_DIR = re.compile(r"'uds': '(/[^']*/hetero_ppo_\w+)/\d+\.sock'")


def marked(mark: str) -> dict[int, str]:
    """Process id -> command line of every living process with this mark."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # gone meanwhile, or not ours
    return {pid: command for pid, command in found.items() if command}  # a zombie has no command line


#: 127.0.0.1, ::1 and 127.0.0.1 as an IPv6 address, as /proc/net shows them.
LOOPBACK_ADDRESSES = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def listening_addresses(pids: Iterable[int]) -> set[str]:
    """Return the addresses on which these processes listen for TCP connections, as /proc/net shows them."""
    inodes = set()
    for pid in pids:
        with suppress(FileNotFoundError):  # it has ended
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(FileNotFoundError):
                    inodes.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float) -> float:
    """Wait until the condition holds. Return the seconds; fail the test at the timeout."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, f"{what}: not within {timeout_s} s"
        time.sleep(0.05)
    return time.monotonic() - start


@dataclass
class RunningJob:
    """A run in the background."""

    process: subprocess.Popen[str]
    mark: str
    run_dir: Path
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text()

    @property
    def processes(self) -> dict[int, str]:
        return marked(self.mark)

    def find(self, part: str) -> list[int]:
        """Return the processes of the run whose command line contains ``part``."""
        return [pid for pid, command in self.processes.items() if part in command]

    def steps_done(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def wait_steps(self, count: int, timeout_s: float) -> None:
        def reached() -> bool:
            assert self.process.poll() is None, self.text[-3000:]
            return self.steps_done() >= count

        wait_for(reached, f"step {count}", timeout_s)

    def wait_end(self, timeout_s: float) -> int:
        """Wait for the end of the run. Return the exit status."""
        return self.process.wait(timeout=timeout_s)

    def private_dir(self) -> Path:
        """Return the directory in shared memory that held the servers' sockets and weights, from the first server's log."""
        match = PRIVATE_DIR.search((self.run_dir / "rollout" / "server_0.log").read_text())
        assert match is not None
        return Path(match[1])

    def assert_nothing_is_left(self, within_s: float = 10.0) -> None:
        """Assert that no process and no directory in shared memory is left."""
        wait_for(lambda: not self.processes, f"these to end: {self.processes}", within_s)
        if (self.run_dir / "rollout" / "server_0.log").exists():
            assert not self.private_dir().exists()


@contextmanager
def running(
    num_processes: int, command: list[str], run_dir: Path, program: Sequence[str] = ("-m", "hetero_ppo.cli.main")
) -> Iterator[RunningJob]:
    """Start a ``hetero-ppo`` command under the launcher; whatever the test does, nothing of it survives the block."""
    mark = uuid.uuid4().hex
    log = run_dir.with_suffix(".log")
    with log.open("w") as out:
        process = subprocess.Popen(
            launch_command(num_processes, [*program, *command]),
            cwd=ROOT,
            env=environment(mark),
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    job = RunningJob(process, mark, run_dir, log)
    try:
        yield job
    finally:
        for pid in job.processes:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.wait()

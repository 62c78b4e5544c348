"""Run ``hetero-ppo`` with a fault of one rank at a given point: ``torchrun ... faults_worker.py '<fault>' train --config ...``.

The fault is JSON with the fields of :class:`Fault`. A point is ``phase:NAME`` of the timer, ``call:module:Class.method`` or
``call:module:function``, or ``write:PATTERN``: the first write to a file whose path matches, of which only half reaches the file.
"""

from __future__ import annotations

import builtins
import fnmatch
import functools
import importlib
import io
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from faults_cases import HAPPENED

from hetero_ppo.cli.main import main
from hetero_ppo.engines.role_snapshot import RoleSnapshot
from hetero_ppo.observability.metrics import MetricsLogger
from hetero_ppo.observability.timers import PhaseTimer

#: Text in the command line of each process of a server. The guardian's contains that of its server.
SERVER_PROCESSES = {
    "api server": "vllm.entrypoints.openai.api_server",
    "engine core": "EngineCore",
    "guardian": "guardian.py",
}


def descendants(pid: int) -> list[int]:
    """Return the children of a process, and their descendants."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def find_server_process(name: str) -> int:
    """Find a process of this rank's first server by its name."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in descendants(os.getpid())}
    fit = [pid for pid, command in commands.items() if SERVER_PROCESSES[name] in command]
    return min(pid for pid in fit if name == "guardian" or SERVER_PROCESSES["guardian"] not in commands[pid])


class TornFile:
    """A file whose process dies in the middle of a write."""

    def __init__(self, file: Any, strike: Callable[[], None]) -> None:
        self._file, self._strike = file, strike

    def write(self, data: Any) -> int:
        self._file.write(data[: len(data) // 2])
        self._file.flush()
        self._strike()
        raise AssertionError("the process survived its fault")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@dataclass
class Fault:
    """A fault that happens once, when the point is reached for the first time after some steps.

    Attributes:
        point: Point of the program.
        logged: Number of steps whose metrics must be written before.
        what: ``kill`` (SIGKILL), ``stop`` (SIGSTOP), ``hang`` (the thread sleeps for ever), ``hold the gil`` (C code runs for ever).
        to: ``rank`` for this process, or one of SERVER_PROCESSES of this rank's first server.
        after_s: Seconds from the point to the fault, which then comes from another thread.
        rank: Rank that meets the fault.
        role: Role of the engine whose method is the point, or None for any role.
        held: True to keep every checkpoint after ``logged`` steps from being written, so that the fault finds it in flight.
    """

    point: str
    logged: int
    what: str
    to: str = "rank"
    after_s: float = 0.0
    rank: int = 0
    role: str | None = None
    held: bool = False
    steps_logged: int = field(default=0, init=False)
    has_happened: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.is_mine = int(os.environ["RANK"]) == self.rank

    def arm(self) -> None:
        """Patch the program with the fault."""
        self._wrap(MetricsLogger, "log", self._count)
        if self.held:
            self._wrap(RoleSnapshot, "write", lambda arguments: self._hold())
        kind, _, rest = self.point.partition(":")
        if kind == "phase":
            self._wrap(PhaseTimer, "phase", lambda arguments: self._happen() if arguments[1] == rest else None)
        elif kind == "write":
            for module in (builtins, io):
                module.open = self._tearing(open, rest)
        else:
            module, _, path = rest.partition(":")
            owner: Any = importlib.import_module(module)
            *parents, name = path.split(".")
            for parent in parents:
                owner = vars(owner)[parent]
            self._wrap(owner, name, lambda arguments: self._happen() if self._is_of_the_role(arguments) else None)

    def _is_of_the_role(self, arguments: tuple[Any, ...]) -> bool:
        return self.role is None or arguments[0].role == self.role

    @staticmethod
    def _wrap(owner: Any, name: str, before: Callable[[tuple[Any, ...]], None]) -> None:
        inner = vars(owner)[name]

        @functools.wraps(inner)
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            before(arguments)
            return inner(*arguments, **keywords)

        setattr(owner, name, wrapped)

    def _tearing(self, inner: Callable[..., Any], pattern: str) -> Callable[..., Any]:
        """Return an ``open`` whose files that match the pattern are torn by their first write."""

        def torn_open(path: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
            file = inner(path, mode, *arguments, **keywords)
            writes = set(mode) & set("wax+")
            if not writes or not self._is_due() or not fnmatch.fnmatch(str(path), pattern):
                return file
            return TornFile(file, self._happen)

        return torn_open

    def _count(self, arguments: tuple[Any, ...]) -> None:
        self.steps_logged += 1

    def _hold(self) -> None:
        """Keep the thread that writes from its write."""
        while self.steps_logged >= self.logged:
            time.sleep(1)

    def _is_due(self) -> bool:
        return self.is_mine and self.steps_logged >= self.logged and not self.has_happened

    def _happen(self) -> None:
        if not self._is_due():
            return
        self.has_happened = True
        if self.after_s > 0:
            threading.Timer(self.after_s, self._strike).start()
        else:
            self._strike()

    def _strike(self) -> None:
        print(f"{HAPPENED}{time.time()}", file=sys.stderr, flush=True)
        pid = os.getpid() if self.to == "rank" else find_server_process(self.to)
        if self.what == "kill":
            os.kill(pid, signal.SIGKILL)
        elif self.what == "stop":
            os.kill(pid, signal.SIGSTOP)
        elif self.what == "hold the gil":
            re.match(r"(a+)+$", "a" * 100 + "b")
        elif self.what == "hang":
            while True:
                time.sleep(1)
        else:
            raise ValueError(f"{self.what!r} is no fault")


if __name__ == "__main__":
    Fault(**json.loads(sys.argv[1])).arm()
    sys.exit(main(sys.argv[2:]))

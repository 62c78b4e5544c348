"""``hetero-ppo`` in which one rank meets a fault at a given point: ``torchrun ... faults_worker.py '<fault>' train --config ...``.

The fault is JSON: ``point`` (``phase:NAME`` of the timer, or ``call:module:Class.method`` with an optional ``role``), ``logged`` (steps whose
metrics are written by then), ``rank``, and ``what``: ``kill`` (SIGKILL to itself) or ``hang``. With ``held`` no checkpoint that is begun after
``logged`` steps is written: it is in flight when the fault happens.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from faults_cases import HAPPENED

from hetero_ppo.cli.main import main
from hetero_ppo.engines.role_snapshot import RoleSnapshot
from hetero_ppo.observability.metrics import MetricsLogger
from hetero_ppo.observability.timers import PhaseTimer

class Fault:
    """Happens the first time that the point is reached after ``logged`` steps."""

    def __init__(
        self, point: str, logged: int, what: str, rank: int = 0, role: str | None = None, held: bool = False
    ) -> None:
        self.point, self.logged, self.what, self.role, self.held = point, logged, what, role, held
        self.is_mine = int(os.environ["RANK"]) == rank
        self.steps_logged = 0

    def arm(self) -> None:
        """Put the fault into the program."""
        self._wrap(MetricsLogger, "log", self._count)
        if self.held:
            self._wrap(RoleSnapshot, "write", lambda arguments: self._hold())
        kind, _, rest = self.point.partition(":")
        if kind == "phase":
            self._wrap(PhaseTimer, "phase", lambda arguments: self._happen() if arguments[1] == rest else None)
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

    def _count(self, arguments: tuple[Any, ...]) -> None:
        self.steps_logged += 1

    def _hold(self) -> None:
        """In the thread that writes."""
        while self.steps_logged >= self.logged:
            time.sleep(1)

    def _happen(self) -> None:
        if not self.is_mine or self.steps_logged < self.logged:
            return
        print(f"{HAPPENED}{time.time()}", file=sys.stderr, flush=True)
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            time.sleep(1)


if __name__ == "__main__":
    Fault(**json.loads(sys.argv[1])).arm()
    sys.exit(main(sys.argv[2:]))

"""Count what vLLM preempts: Python imports this file as it starts, in every process of a run of ``benchmarks/load.py``."""

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import Any

SCHEDULER = "vllm.v1.core.sched.scheduler"
#: The file that gets a byte for every preemption.
FILE = "LOAD_PREEMPTIONS"


def _count_preemptions(scheduler: Any) -> None:
    preempt = scheduler._preempt_request

    def count_and_preempt(self: Any, *args: Any, **keywords: Any) -> Any:
        with open(os.environ[FILE], "ab") as file:
            file.write(b".")
        return preempt(self, *args, **keywords)

    scheduler._preempt_request = count_and_preempt


class _OfScheduler(MetaPathFinder):
    """Patch vLLM's scheduler when it is imported, and not before: most processes never import it."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != SCHEDULER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_patch(module: Any) -> None:
            execute(module)
            _count_preemptions(module.Scheduler)

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


if FILE in os.environ:
    sys.meta_path.insert(0, _OfScheduler())

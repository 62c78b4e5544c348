"""The reward function of some cases of ``benchmarks/faults.py``: it counts words, and one call never returns."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

#: Environment variable with the path of the flag: a file that exists until the function has failed.
FLAG = "HETERO_PPO_FAULTS_FLAG"


def score(prompt: str, response: str, label: Any, metadata: dict[str, Any]) -> float:
    """Return the number of different words. A call that finds the flag removes it and holds the GIL for ever."""
    flag = Path(os.environ.get(FLAG, "/nonexistent"))
    if flag.exists():
        flag.unlink()
        re.match(r"(a+)+$", "a" * 100 + "b")
    return float(len(set(response.split())))

"""The reward function of some cases of ``benchmarks/faults.py``: it counts words, and once it does not return."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

#: Environment variable: a file that is there as long as the function has to fail.
FLAG = "HETERO_PPO_FAULTS_FLAG"


def score(prompt: str, response: str, label: Any, metadata: dict[str, Any]) -> float:
    """Number of different words. While the flag is there, it is removed, and a call holds the GIL for good."""
    flag = Path(os.environ.get(FLAG, "/nonexistent"))
    if flag.exists():
        flag.unlink()
        re.match(r"(a+)+$", "a" * 100 + "b")
    return float(len(set(response.split())))

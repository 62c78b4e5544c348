"""Starts workers under torchrun for tests, with threads set and a deadline."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_torchrun(
    num_processes: int, arguments: list[str], *, timeout_s: float = 180.0, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run ``torchrun --standalone --nproc-per-node N <arguments>`` from the repository's root.

    Fails the test with the end of the output when the run fails and ``check`` is set.
    """
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_processes), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=env,
        timeout=timeout_s,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(arguments)} with {num_processes} processes failed:\n{done.stdout[-6000:]}")
    return done

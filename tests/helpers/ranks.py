"""Ranks of a test, forked from one process that has imported what they need: importing is most of a tiny run.

``run_ranks`` does for a program in a file what torchrun would. Runs that are to start as a user's do go through the project's
launcher (``chain.launch``).

Run as a program (``python -m tests.helpers.ranks``), this module is the process that forks. It reads one request in JSON per line of its
standard input and prints one answer per request. The root of the project is on its import path, so programs import ``tests.helpers``.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: One thread a process, and nothing is fetched or reported. Ranks are forked after torch was asked for devices: torch must ask the driver's
#: management library, since CUDA refuses children of a process that has initialised it.
ENVIRONMENT = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
#: From SIGTERM to SIGKILL of the ranks beside one that failed.
GRACE_S = 5.0
#: Large packages that training needs for some inputs and outputs alone: parquet, figures, Weights & Biases; vLLM runs in its servers.
NOT_IMPORTED = {"pyarrow", "matplotlib", "vllm", "wandb"}


def run_ranks(num_processes: int, program: Sequence[str], *, timeout_s: float = 400.0) -> str:
    """Run a Python file and its arguments on every rank of a world; their output, stdout and stderr together.

    Fails the test with the end of the output when a rank fails, or at the timeout.
    """
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
        request = {"num_processes": num_processes, "program": list(program), "log": log.name, "timeout_s": timeout_s}
        server = _server()
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        failure = json.loads(server.stdout.readline())
        text = log.read()
    if failure is not None:
        raise AssertionError(f"{' '.join(program)} with {num_processes} processes: {failure}\n{text[-6000:]}")
    return text


def outer_environment() -> dict[str, str]:
    """Return the environment of the tests without the variables of pytest and of a world that this process may have joined."""
    world = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {
        name: value
        for name, value in os.environ.items()
        if name not in world and not name.startswith(("PYTEST_", "HETERO_PPO_"))
    }


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Start the process that forks, for the first test of this process that needs it. It ends with this process."""
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.helpers.ranks"],
        cwd=ROOT,
        env={**outer_environment(), **ENVIRONMENT},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None
    atexit.register(server.wait)
    atexit.register(server.stdin.close)
    return server


def serve() -> list[str]:
    """Answer requests. Returns in forked ranks alone: the program, and its arguments."""
    for line in sys.stdin:
        request = json.loads(line)
        ranks: dict[int, int] = {}  # process id -> rank
        port = _free_port()
        for rank in range(request["num_processes"]):
            pid = os.fork()
            if pid == 0:
                _become(rank, request["num_processes"], port, request["log"])
                return request["program"]
            ranks[pid] = rank
        print(json.dumps(_wait(ranks, request["timeout_s"])), flush=True)
    sys.exit()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _become(rank: int, num_processes: int, port: int, log: str) -> None:
    """Make this process a rank: what the launcher sets, and output that goes to the log."""
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
    os.environ |= {name: str(value) for name, value in world.items()}
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "HETERO_PPO_RUN_KEY": f"of these tests, {port}",
    }
    out = os.open(log, os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(source, target)


def _wait(ranks: dict[int, int], timeout_s: float) -> str | None:
    """Wait until all ranks have ended. Return what went wrong, or None. When one fails, the others are ended."""
    failure: str | None = None
    deadline, last = time.monotonic() + timeout_s, signal.SIGTERM
    while ranks:
        for pid in list(ranks):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                rank, code = ranks.pop(pid), os.waitstatus_to_exitcode(status)
                if code and failure is None:
                    failure, deadline = f"rank {rank} ended with {code}", 0.0
        if ranks and time.monotonic() > deadline:
            failure = failure or f"not done within {timeout_s} s"
            for pid in ranks:
                os.kill(pid, last)
            deadline, last = time.monotonic() + GRACE_S, signal.SIGKILL
        time.sleep(0.02)
    return failure


if __name__ == "__main__":
    import hetero_ppo.rollout.vllm
    import hetero_ppo.rollout.megatron
    import hetero_ppo.trainers.open_ppo
    import hetero_ppo.trainers.rm
    import hetero_ppo.trainers.sft  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    assert not NOT_IMPORTED & sys.modules.keys(), (
        f"trainers import {sorted(NOT_IMPORTED & sys.modules.keys())} before they need it"
    )
    gc.collect()
    gc.freeze()  # ranks collect what they made themselves, and share the rest
    file, *arguments = serve()
    sys.argv = [file, *arguments]
    runpy.run_path(file, run_name="__main__")

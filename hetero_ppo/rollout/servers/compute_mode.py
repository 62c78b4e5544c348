"""Checks that two processes may use a GPU, because the trainer and a rollout server share one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

#: nvidia-smi's name of the mode in which only one process can use the device. Slurm clusters often set it.
EXCLUSIVE = "Exclusive_Process"
QUERY = ("--query-gpu=index,uuid,compute_mode", "--format=csv,noheader")
MPS_PIPES = "/tmp/nvidia-mps"
TIMEOUT_S = 30.0


def check_compute_mode() -> None:
    """Raise ValueError where a GPU of this process allows one process only and no MPS daemon shares it."""
    program = shutil.which("nvidia-smi")
    if program is None or mps_runs(dict(os.environ)):
        return
    answer = subprocess.run([program, *QUERY], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    exclusive = exclusive_devices(answer.stdout, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if exclusive:
        raise ValueError(
            f"GPU {', '.join(exclusive)}: compute mode {EXCLUSIVE} lets one process use it, and the trainer shares it with a rollout "
            "server. Set it with `nvidia-smi -c DEFAULT`, start an MPS daemon (nvidia-cuda-mps-control -d), ask the cluster for "
            "shared mode, or generate with rollout.engine=megatron"
        )


def exclusive_devices(answer: str, visible: str | None) -> list[str]:
    """Return the indices of exclusive GPUs among the visible ones.

    Args:
        answer: Lines of nvidia-smi: index, UUID, compute mode.
        visible: Value of CUDA_VISIBLE_DEVICES. None: all GPUs are visible.
    """
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines() if line.count(",") == 2]
    names = None if visible is None else {name.strip() for name in visible.split(",")}
    return [index for index, uuid, mode in rows if mode == EXCLUSIVE and (names is None or {index, uuid} & names)]


def mps_runs(environment: dict[str, str]) -> bool:
    """Return whether an MPS daemon listens where CUDA expects it."""
    return (Path(environment.get("CUDA_MPS_PIPE_DIRECTORY", MPS_PIPES)) / "control").exists()

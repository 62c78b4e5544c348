"""Check that a run does not compute on the CPU by mistake on a machine that has GPUs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

#: Variables that Slurm sets in a job with GPUs: these list the GPUs' names, the next one counts them.
SLURM_LISTS = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
SLURM_COUNT = "SLURM_GPUS_ON_NODE"
#: First entry of CUDA_VISIBLE_DEVICES that names a GPU. Anything else hides all of them.
VISIBLE = re.compile(r"\d+$|GPU-|MIG-")


def check_gpus_are_used(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> None:
    """Raise ValueError when the machine has GPUs that torch does not use. Call it when torch found none.

    ``CUDA_VISIBLE_DEVICES=`` (empty) asks for the CPU and passes.

    Args:
        environment: Environment variables.
        devices: Folder with the driver's device files.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not VISIBLE.match(visible.strip().split(",")[0]):
        return
    files = sorted(path.name for path in devices.glob("nvidia[0-9]*"))
    slurm = [f"{name}={environment[name]}" for name in SLURM_LISTS if environment.get(name)]
    slurm += [f"{SLURM_COUNT}={environment[SLURM_COUNT]}"] if environment.get(SLURM_COUNT, "0") != "0" else []
    if not files and not slurm:
        return
    found = ", ".join([*(f"{devices}/{name}" for name in files), *slurm])
    if torch.version.cuda is None:
        mend = f"torch {torch.__version__} is a build for CPUs. Remove the virtual environment, then DEVICE=gpu bash scripts/install.sh"
    else:
        mend = (
            f"torch {torch.__version__} cannot use them: CUDA {torch.version.cuda} needs a driver as new (nvidia-smi prints the newest "
            "CUDA that the driver knows), and GPUs that this job may open"
        )
    raise ValueError(
        f"this run would compute on the CPU, and the machine has GPUs ({found}): {mend}. To train on the CPU all the same, set "
        "CUDA_VISIBLE_DEVICES= (empty)"
    )

"""Check an environment that scripts/install.sh has made: its packages import, and they are the builds that were asked for.

Run as ``python scripts/check_install.py cpu|gpu [--transformer-engine]``. A GPU install may be checked on a machine without a GPU.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import subprocess
import sys

#: Packages whose CUDA builds break vLLM's loading of models beside a CPU build of torch.
STRAY = ("torchvision", "torchaudio", "torchcodec")


def torch_fault(version: str, cuda: str | None, *, device: str, works: bool, has_gpu: bool) -> str | None:
    """Return what is wrong with the build of torch, or None.

    Args:
        version: Version of torch.
        cuda: CUDA version that it was built with; None for a CPU build.
        device: What was asked for: cpu or gpu.
        works: Whether torch can compute on a GPU here.
        has_gpu: Whether nvidia-smi lists one.
    """
    if device == "cpu":
        return None if "+cpu" in version else f"torch {version} is not a CPU build"
    if cuda is None:
        return f"torch {version} is not a CUDA build: remove the virtual environment and install again with DEVICE=gpu"
    if has_gpu and not works:
        return (
            f"torch {version} sees no GPU, though nvidia-smi does: it was built for CUDA {cuda}, which needs a driver as new "
            "(nvidia-smi prints the newest CUDA that the driver knows). DEVICE=cpu installs for the CPU"
        )
    return None


def transformer_engine_fault() -> str | None:
    """Return why Megatron-Core would not use Transformer Engine, or None. It imports both."""
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError) as error:
        return f"Transformer Engine is installed and cannot be imported: {error}"
    if not importlib.import_module("megatron.core.extensions.transformer_engine").HAVE_TE:
        return "Megatron-Core cannot use the installed Transformer Engine (HAVE_TE is False), though it imports"
    return None


def has_driver() -> bool:
    """Return whether the driver's library is here, which Transformer Engine loads on import."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def lists_gpu() -> bool:
    """Return whether nvidia-smi is there and lists a GPU."""
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def main(device: str, with_transformer_engine: bool) -> None:
    """Import everything, print the versions, and end with an error where something is wrong."""
    if with_transformer_engine and not has_driver():
        print(
            "no driver here: that everything imports with Transformer Engine shows on a GPU node, with "
            "`python scripts/check_install.py gpu --transformer-engine`"
        )
        return
    import torch

    import hetero_ppo  # noqa: F401
    import megatron_bridge.platform  # noqa: F401
    import megatron.core
    import omegaconf  # noqa: F401
    import tensorboard  # noqa: F401
    import transformers
    import vllm

    has_gpu = lists_gpu()
    works = device == "gpu" and torch.cuda.is_available()
    faults = [torch_fault(torch.__version__, torch.version.cuda, device=device, works=works, has_gpu=has_gpu)]
    if device == "cpu":
        stray = [name for name in STRAY if importlib.util.find_spec(name)]
        faults += [f"{', '.join(stray)} must not be installed beside a CPU build of torch"] if stray else []
    elif with_transformer_engine:
        faults.append(transformer_engine_fault())
    for fault in filter(None, faults):
        raise SystemExit(f"error: {fault}")
    print(
        f"torch {torch.__version__}, megatron-core {megatron.core.__version__}, vllm {vllm.__version__}, "
        f"transformers {transformers.__version__}"
    )
    if device == "gpu" and not works:
        print("no GPU here: that torch can use one shows on a GPU node, where a run refuses to start without")


if __name__ == "__main__":
    main(sys.argv[1], "--transformer-engine" in sys.argv[2:])

"""The one place that adapts Megatron-Core to the machine. Start here; ``cpu_rewrite.py`` has the import hook.

Import this package before any ``megatron.core`` module. With CUDA it changes only what a missing Transformer Engine breaks (the fallback
of Adam, the router's product). Without CUDA it installs an import hook that replaces ``torch.cuda`` and ``"cuda"`` inside
``megatron.core`` modules (``cpu_rewrite``) by a small CPU stand-in (``cpu_device``). torch itself and all other libraries stay as they are.
"""

from __future__ import annotations

import sys
import warnings

import torch

HAS_CUDA: bool = torch.cuda.is_available()


#: Warnings that Megatron-Core causes on every rank of every run and that nobody can act on, as (message, category, module): missing
#: optional kernels (a run logs once which layer spec it uses), a deprecated default of its own, its distributed optimizer's access to
#: gradients of shards, and its use of collectives that torch has renamed.
_KNOWN_WARNINGS = (
    (r"(Transformer Engine and )?Apex (is|are) not installed", UserWarning, r"megatron\.core\."),
    (r"full scope is deprecated. Use empty cuda_graph_scope", UserWarning, r"megatron\.core\."),
    (r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed", UserWarning, r"megatron\.core\."),
    (r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning, r"torch\.distributed\."),
)


def _silence_known_warnings() -> None:
    for message, category, module in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category, module=module)


def _install() -> None:
    _silence_known_warnings()
    loaded = sorted(name for name in sys.modules if name == "megatron.core" or name.startswith("megatron.core."))
    if loaded and not HAS_CUDA:
        raise ImportError(
            f"megatron_bridge.platform must be imported before megatron.core, but {loaded[0]} is loaded already; "
            "import megatron_bridge first"
        )
    if not HAS_CUDA:
        from megatron_bridge.platform import cpu_device, cpu_rewrite

        cpu_rewrite.install()
        cpu_device.cache_freed_memory()
    from megatron_bridge.platform import adam, moe

    adam.install_if_needed()
    moe.install_if_needed(HAS_CUDA)


_install()


def device() -> torch.device:
    """Return the device of this rank: the current CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if HAS_CUDA else torch.device("cpu")


def distributed_backend() -> str:
    """Return the backend of process groups: NCCL for CUDA tensors and gloo for host tensors, or gloo alone."""
    return "cpu:gloo,cuda:nccl" if HAS_CUDA else "gloo"


def synchronize() -> None:
    """Wait until the device has finished its queued work. On a CPU there is nothing to wait for."""
    if HAS_CUDA:
        torch.cuda.synchronize()

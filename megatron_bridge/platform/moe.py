"""Adapt mixture-of-experts layers to machines without Transformer Engine and without CUDA."""

from __future__ import annotations

import importlib.util

import numpy
import torch


def install_if_needed(has_cuda: bool) -> None:
    """Adapt Megatron-Core's router and token dispatchers to the machine."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if importlib.util.find_spec("transformer_engine") is None:
        # The router asks whether Transformer Engine's product is None, but only an import of Transformer Engine defines that name.
        moe_utils.te_general_gemm = None
    if not has_cuda:
        token_dispatcher.maybe_move_tensor_to_cpu = _to_host


def _to_host(
    tensor: torch.Tensor | None, as_numpy: bool = False, record_stream: bool = False
) -> torch.Tensor | numpy.ndarray | None:
    """Return split sizes as host arrays. On a CPU they lie there already, so Megatron-Core's copy, which would convert them, does not run."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

"""Operations on rows: a row's result depends on that row alone, and an element's result does not depend on where it lies in memory.

Elementwise and row-wise kernels can give equal inputs different bits for two reasons. A vector loop and its scalar remainder may compute
a function differently, so that an element's bits depend on its offset. And the order of a sum may depend on the shape of the whole
tensor. Therefore functions are composed of operations that IEEE 754 rounds correctly (+, -, *, /, square root) and of ``exp``, which in
torch is the same at every offset (``tests/numerics/test_aligned_kernels.py``), and sums run over contiguous rows. On CUDA one thread
computes an element the same way wherever it lies, and sums use Megatron-Core's batch-invariant kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import megatron_bridge.platform  # noqa: F401  before any module of Megatron-Core

from megatron_bridge.model.kernels import rms_norm_backward

#: Number of elements that elementwise work processes at a time; a few such pieces fit into a core's cache.
PIECE = 1 << 16


def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute ``kernels.rms_norm`` with aligned operations: [..., hidden] and weight [hidden] -> [..., hidden]."""
    return _AlignedRmsNorm.apply(hidden_states, weight, eps)


class _AlignedRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        x32 = x.float()
        scale = row_sums(x32 * x32).unsqueeze(-1).div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x32 * scale).mul_(weight.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return (*rms_norm_backward(grad, *ctx.saved_tensors), None)


def swiglu(gate_and_up: Tensor) -> Tensor:
    """Compute ``kernels.swiglu`` with aligned operations in float32: [..., 2 f], the gate first -> [..., f]."""
    return _AlignedSwiglu.apply(gate_and_up)


class _AlignedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        width = gate_and_up.shape[-1] // 2
        rows = gate_and_up.reshape(-1, 2 * width)
        result = torch.empty(rows.shape[0], width, dtype=rows.dtype, device=rows.device)
        step = max(1, rows.shape[0] if rows.is_cuda else PIECE // width)
        scratch = torch.empty(2, step, width, dtype=torch.float32, device=rows.device)
        for start in range(0, rows.shape[0], step):
            piece = rows[start : start + step]
            factor, silu = scratch[:, : piece.shape[0]]
            factor.copy_(piece[:, :width])
            torch.neg(factor, out=silu).exp_().add_(1.0)
            torch.div(factor, silu, out=silu)
            factor.copy_(piece[:, width:])
            torch.mul(silu, factor, out=silu if rows.dtype != torch.float32 else result[start : start + step])
            if rows.dtype != torch.float32:
                result[start : start + step] = silu
        return result.view(*gate_and_up.shape[:-1], width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_and_up)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        torch.mul(grad, torch.nn.functional.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return result


def row_dot(rows: Tensor, vector: Tensor) -> Tensor:
    """Compute the dot product of each row and a vector: [..., hidden] and [hidden] -> [...] float32."""
    return row_sums(rows.contiguous().float() * vector.float())


def row_sums(rows: Tensor) -> Tensor:
    """Sum over each row, [..., n] contiguous -> [...], in an order that depends on n alone.

    torch's reductions on CUDA cut a row into more parts when few rows leave the device idle. Megatron-Core's batch-invariant mean computes
    each row in one program.
    """
    if not rows.is_cuda:
        return rows.sum(dim=-1)
    from megatron.core.transformer.custom_layers.batch_invariant_kernels import mean_dim  # needs Triton

    return mean_dim(rows, dim=-1).mul_(rows.shape[-1])

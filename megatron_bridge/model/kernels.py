"""Autograd functions of the local layer spec: RMSNorm, SwiGLU, and rotary embedding fused with causal attention.

Their backwards are written out. So elementwise work is done once, in float32, and nothing is stored that one operation on a stored tensor
gives again. All arithmetic is float32, whatever the tensors' dtype; a result is rounded once, when it is returned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute the root-mean-square norm (Zhang and Sennrich 2019).

    Args:
        hidden_states: [..., hidden].
        weight: [hidden].
        eps: Number added to the mean square.

    Returns:
        [..., hidden] in the dtype of ``hidden_states``.
    """
    return _RmsNorm.apply(hidden_states, weight, eps)


class _RmsNorm(torch.autograd.Function):
    """Root-mean-square norm. With r = rsqrt(mean(x^2) + eps) and n = x r: y = n w, dw = sum(g n), dx = r (g w - n mean(g w n))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        scale = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
        scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x32 * scale).mul_(weight.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return (*rms_norm_backward(grad, *ctx.saved_tensors), None)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of x [..., hidden] and weight [hidden].

    Args:
        grad: Gradient of the norm's output, [..., hidden].
        x: Input of the norm.
        weight: Weight of the norm.
        scale: R of ``_RmsNorm``, [..., 1].
    """
    hidden = x.shape[-1]
    weight32 = weight.float()
    grad32 = grad.float()
    normed = x.float() * scale
    product = (grad32 * normed).reshape(-1, hidden)
    grad_weight = product.sum(dim=0)
    mean = torch.mv(product, weight32).div_(hidden).view_as(scale)
    grad_x = (grad32 * weight32).addcmul_(normed, mean, value=-1).mul_(scale)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def swiglu(gate_and_up: Tensor) -> Tensor:
    """Compute silu(gate) * up (Shazeer 2020): [..., 2 f], the gate first -> [..., f]."""
    return _Swiglu.apply(gate_and_up)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        ctx.save_for_backward(gate_and_up, activated)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        gate_and_up, activated = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_and_up)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        torch.mul(grad, activated, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return result


def rotary_causal_attention(mixed: Tensor, cos: Tensor, sin: Tensor, softmax_scale: float) -> Tensor:
    """Compute ``fused_attention.AttentionKernel``, keeping the whole tensor of scores."""
    return _RotaryCausalAttention.apply(mixed, cos, sin, softmax_scale)


class _RotaryCausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mixed: Tensor, cos: Tensor, sin: Tensor, softmax_scale: float) -> Tensor:
        s, b, g, heads, d = mixed.shape
        r = heads - 2
        # [b, g, r + 2, s, d]: the factors of one product are contiguous
        inputs = torch.empty(b, g, heads, s, d, dtype=torch.float32, device=mixed.device)
        inputs.copy_(mixed.permute(1, 2, 3, 0, 4))
        rotated = torch.empty(b, g, r + 1, s, d, dtype=torch.float32, device=mixed.device)
        rotate(inputs[:, :, : r + 1], cos, sin, 1.0, out=rotated)
        query, key, value = _products(rotated, inputs)
        causal = torch.full((s, s), -torch.inf, device=mixed.device).triu_(1).repeat(r, 1)
        with products_of(mixed.dtype):
            scores = torch.baddbmm(causal, query, key.transpose(1, 2), alpha=softmax_scale)
            probs = torch.softmax(scores, dim=-1)
            attended = torch.bmm(probs, value)
        ctx.save_for_backward(rotated, inputs, probs, cos, sin)
        ctx.softmax_scale = softmax_scale
        ctx.dtype = mixed.dtype
        result = torch.empty(s, b, g, r, d, dtype=mixed.dtype, device=mixed.device)
        return result.copy_(attended.view(b, g, r, s, d).permute(3, 0, 1, 2, 4)).view(s, b, g * r * d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        rotated, inputs, probs, cos, sin = ctx.saved_tensors
        b, g, heads, s, d = inputs.shape
        r = heads - 2
        query, key, value = _products(rotated, inputs)
        grad_out = torch.empty(b, g, r, s, d, dtype=torch.float32, device=grad.device)
        grad_out = grad_out.copy_(grad.view(s, b, g, r, d).permute(1, 2, 3, 0, 4)).view(b * g, r * s, d)
        grad_inputs = torch.empty_like(inputs)
        grad_rotated = torch.empty_like(rotated)
        with products_of(ctx.dtype):
            grad_inputs[:, :, r + 1] = torch.bmm(probs.transpose(1, 2), grad_out).view(b, g, s, d)
            grad_scores = torch._softmax_backward_data(
                torch.bmm(grad_out, value.transpose(1, 2)), probs, -1, torch.float32
            )
            grad_scores.mul_(ctx.softmax_scale)
            grad_rotated[:, :, :r] = torch.bmm(grad_scores, key).view(b, g, r, s, d)
            grad_rotated[:, :, r] = torch.bmm(grad_scores.transpose(1, 2), query).view(b, g, s, d)
        rotate(grad_rotated, cos, sin, -1.0, out=grad_inputs[:, :, : r + 1])
        result = torch.empty(s, b, g, heads, d, dtype=ctx.dtype, device=grad.device)
        return result.copy_(grad_inputs.permute(3, 0, 1, 2, 4)), None, None, None


def _products(rotated: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return views for the products: queries [b * g, r * s, d], keys and values [b * g, s, d]."""
    b, g, heads, s, d = inputs.shape
    rotated = rotated.view(b * g, heads - 1, s, d)
    query = rotated[:, : heads - 2].as_strided((b * g, (heads - 2) * s, d), (rotated.stride(0), d, 1))
    return query, rotated[:, heads - 2], inputs.view(b * g, heads, s, d)[:, heads - 1]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float, out: Tensor) -> None:
    """Write x cos + sign rotate_half(x) sin to ``out``, where rotate_half((a, b)) = (-b, a).

    The gradient of a rotation is the rotation by the negative angle, ``sign`` -1.
    """
    half = x.shape[-1] // 2
    sin = sin[:, :half]
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin, value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin, value=sign)


@contextmanager
def products_of(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 products inside the body round their factors to bf16 on a CPU if ``dtype`` is bf16, as kernels for GPUs do."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch puts an object in the module's place
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16" if dtype == torch.bfloat16 else before
    try:
        yield
    finally:
        matmul.fp32_precision = before

"""Rotary embedding and causal attention, one tile of queries at a time.

A tile of ``TILE`` queries attends to the keys up to the tile's own end. So the shape of every product, and with it the order of its
sums, depends only on where the tile lies in its sequence. Padding behind the tile and other sequences have no influence.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_bridge.aligned.products import batched_product
from megatron_bridge.model.kernels import products_of, rotate

#: Most tokens of a sequence whose probabilities are kept for the backward. Those of longer sequences are computed again, because their
#: size grows with the square of the length.
KEPT = 256
#: Queries of a tile. Shapes are multiples of it, so vector loops have no remainder.
TILE = 64


def rotary_causal_attention(mixed: Tensor, cos: Tensor, sin: Tensor, softmax_scale: float) -> Tensor:
    """Compute ``fused_attention.AttentionKernel`` one tile of queries at a time."""
    return _TiledAttention.apply(mixed, cos, sin, softmax_scale)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mixed: Tensor, cos: Tensor, sin: Tensor, softmax_scale: float) -> Tensor:
        s, b, g, heads, d = mixed.shape
        r = heads - 2
        padded = s + -s % TILE
        inputs = torch.zeros(b, g, heads, padded, d, dtype=torch.float32, device=mixed.device)
        inputs[:, :, :, :s] = mixed.permute(1, 2, 3, 0, 4)
        rotated = torch.zeros(b, g, r + 1, padded, d, dtype=torch.float32, device=mixed.device)
        _rotate(inputs[:, :, : r + 1, :s], cos, sin, out=rotated[:, :, :, :s])
        result = torch.empty(b, g, r, padded, d, dtype=torch.float32, device=mixed.device)
        kept = []
        with products_of(mixed.dtype):
            for end in range(TILE, padded + TILE, TILE):
                query, key, value = _tile(rotated, inputs, end)
                probs = _probabilities(query, key, softmax_scale)
                result[:, :, :, end - TILE : end] = batched_product(probs, value).view(b, g, r, TILE, d)
                if ctx.needs_input_grad[0] and padded <= KEPT:
                    kept.append(probs)
        ctx.save_for_backward(rotated, inputs, cos, sin, *kept)
        ctx.softmax_scale = softmax_scale
        ctx.dtype = mixed.dtype
        ctx.length = s
        output = torch.empty(s, b, g, r, d, dtype=mixed.dtype, device=mixed.device)
        return output.copy_(result[:, :, :, :s].permute(3, 0, 1, 2, 4)).view(s, b, g * r * d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        rotated, inputs, cos, sin, *kept = ctx.saved_tensors
        b, g, heads, padded, d = inputs.shape
        r, s = heads - 2, ctx.length
        grad_out = torch.zeros(b, g, r, padded, d, dtype=torch.float32, device=grad.device)
        grad_out[:, :, :, :s] = grad.view(s, b, g, r, d).permute(1, 2, 3, 0, 4)
        grad_inputs, grad_rotated = torch.zeros_like(inputs), torch.zeros_like(rotated)
        with products_of(ctx.dtype):
            for end in range(TILE, padded + TILE, TILE):
                query, key, value = _tile(rotated, inputs, end)
                probs = kept[end // TILE - 1] if kept else _probabilities(query, key, ctx.softmax_scale)
                tile_grad = grad_out[:, :, :, end - TILE : end].reshape(b * g, r * TILE, d)
                grad_inputs[:, :, r + 1, :end] += torch.bmm(probs.transpose(1, 2), tile_grad).view(b, g, end, d)
                grad_probs = torch.bmm(tile_grad, value.transpose(1, 2))
                grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, torch.float32).mul_(ctx.softmax_scale)
                grad_rotated[:, :, :r, end - TILE : end] = torch.bmm(grad_scores, key).view(b, g, r, TILE, d)
                grad_rotated[:, :, r, :end] += torch.bmm(grad_scores.transpose(1, 2), query).view(b, g, end, d)
        rotate(grad_rotated[:, :, :, :s], cos, sin, -1.0, out=grad_inputs[:, :, : r + 1, :s])
        result = torch.empty(s, b, g, heads, d, dtype=ctx.dtype, device=grad.device)
        return result.copy_(grad_inputs[:, :, :, :s].permute(3, 0, 1, 2, 4)), None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Write x cos + rotate_half(x) sin to ``out``, rounding after every operation.

    A kernel that fuses two operations would leave the choice of roundings to the compiler.
    """
    half = x.shape[-1] // 2
    cos, sin = cos[:, :half], sin[:, :half]
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, cos, out=out[..., :half]).sub_(second * sin)
    torch.mul(second, cos, out=out[..., half:]).add_(first * sin)


def _tile(rotated: Tensor, inputs: Tensor, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tile of queries that ends at ``end``, with the keys and values that it attends to.

    Returns:
        Queries [b * g, r * TILE, d], a copy; keys and values [b * g, end, d], views.
    """
    b, g, heads, padded, d = inputs.shape
    query = rotated[:, :, : heads - 2, end - TILE : end].reshape(b * g, (heads - 2) * TILE, d)
    key = rotated.view(b * g, heads - 1, padded, d)[:, heads - 2, :end]
    value = inputs.view(b * g, heads, padded, d)[:, heads - 1, :end]
    return query, key, value


@functools.cache
def _future(device: torch.device) -> Tensor:
    """Return a mask [TILE, TILE] bool: the keys of a tile that come after each of its queries."""
    return torch.ones(TILE, TILE, dtype=torch.bool, device=device).triu_(1)


def _probabilities(query: Tensor, key: Tensor, softmax_scale: float) -> Tensor:
    """Compute the attention probabilities of a tile: queries [n, r * TILE, d] and keys [n, end, d] -> [n, r * TILE, end]."""
    return _causal_softmax(batched_product(query * softmax_scale, key.transpose(1, 2)))


def _causal_softmax(scores: Tensor) -> Tensor:
    """Turn a tile's scores [n, r * TILE, end] for the keys up to its end into probabilities. Overwrites the scores."""
    n, rows, end = scores.shape
    own_tile = scores.view(n, rows // TILE, TILE, end)[..., end - TILE :]
    own_tile.masked_fill_(_future(scores.device), -torch.inf)
    return torch.softmax(scores, dim=-1)

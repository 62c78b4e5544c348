"""The local spec's own autograd functions against plain formulas: float64 gradients, and no worse than plain bf16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bridge.model.fused_attention import rotation
from megatron_bridge.model.kernels import rms_norm, rotary_causal_attention, swiglu

S, B, GROUPS, PER_GROUP, D = 19, 3, 2, 2, 8
SCALE = D**-0.5


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Compute the norm as transformers' modules do."""
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def plain_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def angles() -> Tensor:
    frequencies = 100.0 ** (-torch.arange(0, D, 2) / D)
    return torch.outer(torch.arange(S), frequencies).repeat(1, 2)[:, None, None]


def plain_attention(mixed: Tensor) -> Tensor:
    cos, sin = (t[:, None, None].to(mixed.dtype) for t in (angles()[:, 0, 0].cos(), angles()[:, 0, 0].sin()))

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    query, key, value = mixed.split((PER_GROUP, 1, 1), dim=3)
    heads = [rotate(query.flatten(2, 3)), rotate(key.flatten(2, 3)), value.flatten(2, 3)]
    out = F.scaled_dot_product_attention(*(x.permute(1, 2, 0, 3) for x in heads), is_causal=True, enable_gqa=True)
    return out.permute(2, 0, 1, 3).flatten(2)


def attention(mixed: Tensor) -> Tensor:
    return rotary_causal_attention(mixed, *rotation(angles(), 1.0), SCALE)


CASES = {
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-5), plain_rms_norm, [(S, B, 24), (24,)]),
    "swiglu": (swiglu, plain_swiglu, [(S, B, 24)]),
    "attention": (attention, plain_attention, [(S, B, GROUPS, PER_GROUP + 2, D)]),
}


def results(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return output and gradients in float64."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = function(*inputs)
    weight = torch.sin(torch.arange(output.numel())).view(output.shape)
    (output * weight.to(output.dtype)).sum().backward()
    return [output.detach().double(), *(x.grad.double() for x in inputs)]


def error(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm())


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients(name: str) -> None:
    """float32 to its rounding; bf16 no further from the truth than the plain formula in bf16 is (5 % for the draw)."""
    own, plain, shapes = CASES[name]
    torch.manual_seed(0)
    inputs = [torch.randn(shape).bfloat16() for shape in shapes]
    truth = results(plain, [x.double() for x in inputs])
    for found, right in zip(results(own, [x.float() for x in inputs]), truth, strict=True):
        assert error(found, right) < 2e-6
    for found, usual, right in zip(results(own, inputs), results(plain, inputs), truth, strict=True):
        assert error(found, right) <= 1.05 * error(usual, right)


def test_attention_is_causal() -> None:
    torch.manual_seed(0)
    mixed = torch.randn(CASES["attention"][2][0])
    changed = mixed.clone()
    changed[10:] += 1.0
    assert torch.equal(attention(mixed)[:10], attention(changed)[:10])
    assert not torch.equal(attention(mixed)[10:], attention(changed)[10:])


def test_the_setting_for_products_is_left_as_it_was() -> None:
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    attention(torch.randn(CASES["attention"][2][0]).bfloat16().requires_grad_()).sum().backward()
    assert matmul.fp32_precision == before

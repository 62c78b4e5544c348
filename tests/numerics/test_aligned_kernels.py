"""The parts of aligned layers: the bits of a row or element do not depend on what else is computed, and gradients are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bridge.aligned import attention, products, rows
from megatron_bridge.model import kernels

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True, params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "function", [torch.exp, torch.log, torch.rsqrt, torch.cos, torch.sin], ids=lambda f: f.__name__
)
def test_functions_do_not_depend_on_the_offset(function: Callable[[Tensor], Tensor]) -> None:
    values = torch.rand(70_001) * 20 + 1e-6
    if function is torch.exp:
        values = values - 19
    whole = function(values)
    for start in range(33):
        for length in (1, 7, 16, 31, 4_099, 65_000):
            part = slice(start, start + length)
            assert torch.equal(function(values[part].clone()), whole[part]), (start, length)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("k", "n"), [(48, 96), (52, 100), (276, 72), (72, 276), (256, 1024), (1024, 256), (300, 132), (2560, 264)]
)
def test_products_do_not_depend_on_rows_and_columns(k: int, n: int, dtype: torch.dtype) -> None:
    inputs, weight = torch.randn(700, k).to(dtype), torch.randn(n, k).to(dtype)
    alone = torch.cat([products.product(row[None], weight) for row in inputs[:8]])
    for num_rows in (8, 63, 64, 65, 130, 256, 300, 511, 700):
        result = products.product(inputs[:num_rows], weight)
        assert torch.equal(result[:8], alone), num_rows
        for parts in (2, 4):
            split = [products.product(inputs[:num_rows], part) for part in weight.chunk(parts)]
            assert torch.equal(torch.cat(split, dim=1), result), (num_rows, parts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_products_are_those_of_the_whole_weight(dtype: torch.dtype) -> None:
    """The ranks of TP 2 and 4 have from 1 to 16 outputs each, or as many as that in all."""
    for k in (32, 276) if dtype == torch.float32 else (32,):  # bf16 products are compiled for every shape
        inputs = torch.randn(130, k).to(dtype)
        for n in range(1, 17):
            for parts in (1, 2, 4):
                weight = torch.randn(n * parts, k).to(dtype)
                whole = products.product(inputs, weight)
                for num_rows in (1, 33, 130):
                    split = [products.product(inputs[:num_rows], part) for part in weight.chunk(parts)]
                    assert torch.equal(torch.cat(split, dim=1), whole[:num_rows]), (k, n, parts, num_rows)


@pytest.mark.parametrize("n", [1, 16, 37])
def test_batches_of_products_are_the_products(n: int) -> None:
    left, right = torch.randn(n, 5, 12), torch.randn(n, 7, 12).transpose(1, 2)
    assert torch.allclose(products._bmm_in_batches(left, right), torch.bmm(left, right), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_other_rows(dtype: torch.dtype) -> None:
    inputs, weight = torch.randn(900, 276).to(dtype), torch.randn(276).to(dtype)
    functions = (lambda x: rows.rms_norm(x, weight, 1e-6), rows.swiglu, lambda x: rows.row_dot(x, weight))
    for function in functions:
        whole = function(inputs)
        for part in (slice(0, 1), slice(5, 6), slice(3, 70), slice(899, 900), slice(1, 899)):
            assert torch.equal(function(inputs[part]), whole[part])
    gate, up = inputs.chunk(2, dim=1)
    split = [rows.swiglu(torch.cat(part, dim=1)) for part in zip(gate.chunk(3, dim=1), up.chunk(3, dim=1), strict=True)]
    assert torch.equal(torch.cat(split, dim=1), rows.swiglu(inputs))


def _mixed(s: int, b: int, g: int, r: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    angles = torch.outer(torch.arange(s), 100.0 ** -torch.linspace(0, 1, d // 2)).repeat(1, 2)
    return torch.randn(s, b, g, r + 2, d).to(dtype), angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("r", "d"), [(1, 20), (2, 18)])
def test_attention_does_not_depend_on_padding_neighbours_and_groups(r: int, d: int, dtype: torch.dtype) -> None:
    mixed, cos, sin = _mixed(200, 3, 4, r, d, dtype)
    whole = attention.rotary_causal_attention(mixed, cos, sin, 0.3).view(200, 3, 4, r, d)
    for length in (1, 63, 65, 129, 200):
        for row in (slice(0, 1), slice(2, 3), slice(1, 3)):
            for group in (slice(0, 4), slice(1, 2), slice(2, 4)):
                part = mixed[:length, row, group]
                result = attention.rotary_causal_attention(part, cos[:length], sin[:length], 0.3)
                assert torch.equal(result, whole[:length, row, group].flatten(2)), (length, row, group)


@pytest.mark.parametrize("kept", [0, 256])
def test_gradients_are_those_of_the_plain_functions(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients are right both when attention's probabilities are kept and when they are computed again."""
    monkeypatch.setattr(attention, "KEPT", kept)
    weight = torch.randn(40)
    cases: list[tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]] = [
        (
            lambda x, w: rows.rms_norm(x, w, 0.1),
            lambda x, w: F.rms_norm(x, (40,), w, 0.1),
            [torch.randn(7, 40), weight],
        ),
        (rows.swiglu, kernels.swiglu, [torch.randn(7, 40)]),
        (rows.row_dot, torch.mv, [torch.randn(7, 40), weight]),
        (products.product, F.linear, [torch.randn(70, 40), torch.randn(9, 40)]),
    ]
    mixed, cos, sin = _mixed(150, 2, 2, 3, 8, torch.float32)
    cases.append(
        (
            lambda x: attention.rotary_causal_attention(x, cos, sin, 0.4),
            lambda x: kernels.rotary_causal_attention(x, cos, sin, 0.4),
            [mixed],
        )
    )
    for aligned, plain, inputs in cases:
        inputs = [x.requires_grad_() for x in inputs]
        results = [aligned(*inputs), plain(*inputs)]
        assert torch.allclose(results[0], results[1], atol=1e-5)
        upstream = torch.randn_like(results[0])
        gradients = [torch.autograd.grad(result, inputs, upstream) for result in results]
        for ours, theirs in zip(*gradients, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4 * float(theirs.abs().max()))

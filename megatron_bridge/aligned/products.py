"""Matrix products whose rows do not depend on how many rows there are, nor their columns on how many columns.

On CUDA they are Megatron-Core's batch-invariant kernel, in which one program makes a whole tile of the result, over all of the inner
size and in one order, whatever the number of rows and columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

#: Matrices of a batched product on CUDA.
BATCH = 16
#: Rows of a product are a multiple of it. A BLAS chooses another kernel, with another order of additions, for a few rows (below 4 with
#: one thread, below 16 with two); from there on kernels differ in how they cut rows and columns, not in a sum's order, which
#: ``tests/numerics/test_aligned_kernels.py`` holds them to.
ROWS = 32
#: Columns of a product at least, for the same reason: with fewer (below 12 on one machine), kernels for narrow results add in
#: another order than those of the whole weight, of which a tensor-parallel rank has a part.
COLUMNS = 16
#: Terms of a float32 sum that a BLAS is given at once. On Intel, MKL cuts sums of 1000 terms and more, at places that depend on the
#: number of columns; up to 768 it did not. bfloat16 products are oneDNN's, which does not.
TERMS = 512


def product(inputs: Tensor, weight: Tensor) -> Tensor:
    """[..., k] and [n, k] -> [..., n], the inputs times the transpose of the weight."""
    return _Product.apply(inputs, weight)


def batched_product(left: Tensor, right: Tensor) -> Tensor:
    """[n, m, k] and [n, k, p] -> [n, m, p]. What a matrix gives does not depend on how many there are."""
    return _bmm_in_batches(left, right) if left.is_cuda else torch.bmm(left, right)


def _bmm_in_batches(left: Tensor, right: Tensor) -> Tensor:
    """Every call of cuBLAS is for ``BATCH`` matrices, contiguous and filled up with zeros: m, k and p alone decide over its kernel."""
    result = torch.empty(left.shape[0], left.shape[1], right.shape[2], dtype=left.dtype, device=left.device)
    for start in range(0, left.shape[0], BATCH):
        size = min(BATCH, left.shape[0] - start)
        factors = [
            torch.zeros(BATCH, *factor.shape[1:], dtype=factor.dtype, device=factor.device) for factor in (left, right)
        ]
        for padded, factor in zip(factors, (left, right)):
            padded[:size] = factor[start : start + size]
        result[start : start + size] = torch.bmm(*factors)[:size]
    return result


def _rows_product(rows: Tensor, weight: Tensor) -> Tensor:
    """[m, k] and [n, k] -> [m, n]."""
    if rows.is_cuda:
        from megatron.core.transformer.custom_layers.batch_invariant_kernels import matmul_persistent  # needs Triton

        return matmul_persistent(rows, weight.t())
    if weight.shape[0] < COLUMNS:
        return _rows_product(rows, pad(weight, (0, 0, 0, COLUMNS - weight.shape[0])))[:, : weight.shape[0]].contiguous()
    num_rows = rows.shape[0]
    rest = num_rows % ROWS
    whole = num_rows - rest
    result = torch.empty(whole + ROWS if rest else whole, weight.shape[0], dtype=rows.dtype, device=rows.device)
    if whole:
        _multiply(rows[:whole], weight, result[:whole])
    if rest:
        padded = torch.zeros(ROWS, rows.shape[1], dtype=rows.dtype, device=rows.device)
        padded[:rest] = rows[whole:]
        _multiply(padded, weight, result[whole:])
    return result[:num_rows]


def _multiply(rows: Tensor, weight: Tensor, result: Tensor) -> None:
    """Write [m, k] times the transpose of [n, k] into [m, n]."""
    terms = rows.shape[1] if rows.dtype != torch.float32 else TERMS
    torch.mm(rows[:, :terms], weight[:, :terms].t(), out=result)
    for start in range(terms, rows.shape[1], terms):
        result.addmm_(rows[:, start : start + terms], weight[:, start : start + terms].t())


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        result = _rows_product(inputs.reshape(-1, inputs.shape[-1]), weight)
        return result.view(*inputs.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        inputs, weight = ctx.saved_tensors
        grad_inputs = grad @ weight if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_inputs, None
        rows = inputs.reshape(-1, inputs.shape[-1])
        return grad_inputs, grad.reshape(-1, grad.shape[-1]).t() @ rows

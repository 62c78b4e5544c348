"""Matrix products in which a row does not depend on the number of rows, nor a column on the number of columns.

On CUDA this is Megatron-Core's batch-invariant kernel: one program computes a whole tile of the result over the whole inner size, in
one order, for any number of rows and columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

#: Number of matrices in a batched product on CUDA.
BATCH = 16
#: Products get a multiple of so many rows. For few rows a BLAS chooses another kernel with another order of additions (below 4 rows with
#: one thread, below 16 with two). From there on kernels differ in how they cut rows and columns, but not in the order of a sum;
#: ``tests/numerics/test_aligned_kernels.py`` checks this.
ROWS = 32
#: Products get at least so many columns, for the same reason. With fewer (below 12 on one machine), kernels for narrow results add in
#: another order than those for the whole weight, of which a tensor-parallel rank holds a part.
COLUMNS = 16
#: Most terms of a float32 sum that a BLAS gets at once. On Intel, MKL cuts sums of 1000 terms and more at places that depend on the
#: number of columns; up to 768 it did not. bfloat16 products run in oneDNN, which does not cut them.
TERMS = 512


def product(inputs: Tensor, weight: Tensor) -> Tensor:
    """Compute the product of the inputs and the transposed weight: [..., k] and [n, k] -> [..., n]."""
    return _Product.apply(inputs, weight)


def batched_product(left: Tensor, right: Tensor) -> Tensor:
    """Compute the products of pairs of matrices: [n, m, k] and [n, k, p] -> [n, m, p]. A pair's result does not depend on their number."""
    return _bmm_in_batches(left, right) if left.is_cuda else torch.bmm(left, right)


def _bmm_in_batches(left: Tensor, right: Tensor) -> Tensor:
    """Compute products of pairs in batches of ``BATCH``, contiguous and filled up with zeros, so that only m, k and p choose cuBLAS's kernel."""
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
    """Compute the product of [m, k] and the transpose of [n, k] -> [m, n]."""
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

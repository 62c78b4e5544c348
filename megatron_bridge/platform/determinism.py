"""Settings with which CUDA gives the same bits twice. Exact resume and the serial twins rely on them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

#: Variable -> value. cuBLAS keeps one workspace per stream, Transformer Engine avoids nondeterministic attention, and NCCL does not let
#: NVLink switches sum.
VARIABLES: Mapping[str, str] = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "NCCL_ALGO": "^NVLS",
}


def set_deterministic(environment: MutableMapping[str, str]) -> dict[str, str]:
    """Set the environment variables that are not set yet, and choose torch's deterministic kernels where they exist.

    Call it before the first kernel and the first collective.

    Args:
        environment: Environment variables of this process; changed in place.

    Returns:
        Variable -> value for those that already had another value; they keep it.
    """
    kept = {name: environment[name] for name, value in VARIABLES.items() if environment.get(name, value) != value}
    for name, value in VARIABLES.items():
        environment.setdefault(name, value)
    torch.use_deterministic_algorithms(True, warn_only=True)
    return kept


def deterministic_attention(attention: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Compute attention so that its backward gives the same bits twice, if :func:`set_deterministic` was called.

    While torch only warns of nondeterministic kernels, its flash and memory-efficient attention use the nondeterministic form of their
    backward, and it may choose cuDNN's, which has no other form. So this makes torch strict during this forward and this backward, and lets
    it warn again after each. Without :func:`set_deterministic` it only calls ``attention``.

    Args:
        attention: Function of the inputs that calls one attention kernel of torch, and no kernel that strict mode refuses.
        inputs: Query, key and value, in the shapes that ``attention`` takes.

    Returns:
        The output of ``attention``.
    """
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        return attention(*inputs)
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in inputs):
        with _strict():
            return attention(*inputs)
    inputs = _EndStrictBackward.apply(*inputs)
    with _strict():
        output = attention(*inputs)
    return _BeginStrictBackward.apply(output)


@contextlib.contextmanager
def _strict() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


class _BeginStrictBackward(torch.autograd.Function):
    """Identity after the kernel: its backward runs first."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        torch.use_deterministic_algorithms(True)
        return grad


class _EndStrictBackward(torch.autograd.Function):
    """Identity before the kernel: its backward runs once the gradients of all inputs are there."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        torch.use_deterministic_algorithms(True, warn_only=True)
        return grads

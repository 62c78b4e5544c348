"""Settings under which CUDA gives the same bits twice: what exact resume and a serial twin rest on there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

#: Variable -> value. cuBLAS keeps one workspace per stream, Transformer Engine leaves nondeterministic attention out, and NCCL does not
#: let NVLink switches add numbers up.
VARIABLES: Mapping[str, str] = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "NCCL_ALGO": "^NVLS",
}


def set_deterministic(environment: MutableMapping[str, str]) -> dict[str, str]:
    """Set the variables that are not set, and choose torch's deterministic kernels where it has some.

    To be called before the first kernel and the first collective.

    Args:
        environment: Of this process; changed in place.

    Returns:
        Variable -> value for those that were set to something else before, and stay so.
    """
    kept = {name: environment[name] for name, value in VARIABLES.items() if environment.get(name, value) != value}
    for name, value in VARIABLES.items():
        environment.setdefault(name, value)
    torch.use_deterministic_algorithms(True, warn_only=True)
    return kept


def deterministic_attention(attention: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Compute attention so that its backward gives the same bits twice, where :func:`set_deterministic` was called.

    While torch only warns of kernels that have no deterministic form, its flash and memory-efficient attention take the nondeterministic
    form of their backward, and it may choose cuDNN's, which has no other. So torch is strict during this forward and this backward, and
    warns again after each of them. Elsewhere this calls ``attention`` and does no more.

    Args:
        attention: Function of the inputs that calls one attention kernel of torch, and no kernel that strict mode refuses.
        inputs: Query, key and value, in the shapes that ``attention`` takes.

    Returns:
        What ``attention`` returns.
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

"""Variables that CUDA's bits depend on are set before anything runs, and a user's own values stay and are reported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_bridge.model.context_parallel import attend
from megatron_bridge.platform.determinism import VARIABLES, deterministic_attention, set_deterministic


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def test_variables_are_set() -> None:
    environment: dict[str, str] = {}
    assert set_deterministic(environment) == {}
    assert environment == dict(VARIABLES)
    assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()


def test_values_of_the_user_stay_and_are_returned() -> None:
    environment = {"NCCL_ALGO": "Tree", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    assert set_deterministic(environment) == {"NCCL_ALGO": "Tree"}
    assert environment["NCCL_ALGO"] == "Tree" and environment["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"


class _StrictKernels(TorchDispatchMode):
    """Record for attention kernels, forward and backward, and for products before and after them, whether torch is strict."""

    def __init__(self) -> None:
        super().__init__()
        self.strict: dict[str, set[bool]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_strict = (
            torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
        )
        for kind in ("mul", "attention_for_cpu_backward" if "backward" in str(func) else "attention"):
            if kind in str(func):
                self.strict.setdefault(kind, set()).add(is_strict)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("trained", ["all", "value"])
def test_attention_is_strict_forward_and_backward_and_all_else_warns(trained: str) -> None:
    set_deterministic({})
    torch.manual_seed(0)
    inputs = [torch.randn(9, 2, 4, 8, requires_grad=trained in ("all", name)) for name in ("query", "key", "value")]
    with _StrictKernels() as kernels:
        output = attend(*[tensor * 2 for tensor in inputs], None)
        (output.exp() * 3).sum().backward()
        with torch.no_grad():
            attend(*inputs, None)
    assert kernels.strict["attention"] == kernels.strict["attention_for_cpu_backward"] == {True}
    assert kernels.strict["mul"] == {False}
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    gradients = [tensor.grad for tensor in inputs]
    torch.use_deterministic_algorithms(False)
    plain = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs]
    same = attend(*[tensor * 2 for tensor in plain], None)
    (same.exp() * 3).sum().backward()
    assert torch.equal(output, same)
    for ours, tensor in zip(gradients, plain, strict=True):
        assert (ours is None and tensor.grad is None) or torch.equal(ours, tensor.grad)


def test_an_attention_kernel_that_fails_leaves_torch_as_it_was() -> None:
    set_deterministic({})

    def fails(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        deterministic_attention(fails, torch.zeros(1, requires_grad=True))
    assert torch.is_deterministic_algorithms_warn_only_enabled()

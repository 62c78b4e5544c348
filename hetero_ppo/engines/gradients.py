"""Gradient buffers in fewer passes over memory than Megatron-Core's zeroing, adding, scaling and clipping make."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_bridge.platform.adam import Adam

#: Keeps the clipping of a gradient of 0 finite, as in torch and Megatron-Core.
CLIP_EPS = 1e-6


class FirstGradients:
    """A parameter's first gradient of a step overwrites its buffer, later ones are added: nothing has to be zeroed before.

    Megatron-Core adds a gradient from a hook on the node that accumulates it, which runs after the hook here, and leaves it alone
    where ``grad_added_to_main_grad`` is set.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel]) -> None:
        self._chunks = chunks
        self._parameters = [p for chunk in chunks for p in chunk.module.parameters() if p.requires_grad]
        self._written: set[Tensor] = set()
        for parameter in self._parameters:
            # Of tied embeddings Megatron-Core would add the gradient all the same, for kernels that write it to the buffer themselves.
            parameter.zero_out_wgrad = False
            parameter.register_post_accumulate_grad_hook(self._take)

    def begin(self) -> None:
        """Before the first backward of a step."""
        self._written.clear()
        for chunk in self._chunks:
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                group.reset()

    def _take(self, parameter: Tensor) -> None:
        parameter.grad_added_to_main_grad = parameter not in self._written
        if parameter.grad_added_to_main_grad:
            self._written.add(parameter)
            parameter.main_grad.copy_(parameter.grad)

    def end(self) -> None:
        """After the last backward: parameters that no gradient came to (experts without tokens) have one of 0."""
        for parameter in self._parameters:
            if parameter not in self._written:
                parameter.main_grad.zero_()


def clip_divisor(grad_norm: float, clip: float) -> float:
    """What gradients of norm ``grad_norm`` are divided by so that it is ``clip`` at most; 1 where that is 0 (no clipping)."""
    return max(1.0, (grad_norm + CLIP_EPS) / clip) if clip > 0 else 1.0


def divide_gradients(optimizers: Sequence[MegatronOptimizer], divisor: float) -> None:
    """Divide the gradients that the optimizers are ready to take; on a CPU it is left to the step, which reads them anyway."""
    for one in optimizers:
        if one.optimizer is None:  # a stage without parameters of this class
            continue
        if isinstance(one.optimizer, Adam):
            one.optimizer.grad_scale = divisor
        else:
            gradients = [p.grad for group in one.optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_div_(gradients, divisor)

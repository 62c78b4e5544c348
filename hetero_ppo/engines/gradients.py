"""Gradient buffers in fewer passes over memory than Megatron-Core's zeroing, adding, scaling and clipping make."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_bridge.platform.adam import Adam

#: Keeps the clipping of a gradient of 0 finite, as in torch and Megatron-Core.
CLIP_EPS = 1e-6


class Ddp(DistributedDataParallel):
    """Megatron-Core's wrapper with hooks that do nothing: ``FirstGradients`` adds the gradients up.

    The nodes that they hang on cannot all be made to end: an fp32 role's distributed optimizer holds views of the parameters, and
    these their nodes.
    """

    def _make_backward_post_hook(self, param: torch.nn.Parameter) -> Callable[..., None]:
        return lambda *unused: None


class FirstGradients:
    """Adds the gradients of a step's micro-batches up; the first one overwrites the buffer, so that nothing has to be zeroed before.

    It takes the place of Megatron-Core's hooks, which hang on the nodes that accumulate gradients. torch makes new nodes when a
    parameter's ``data`` moves between devices, as it does for a checkpoint from host memory, and the old ones' hooks never run again.
    A hook of the parameter itself stays.
    """

    def __init__(self, chunks: Sequence[Ddp]) -> None:
        """Args:
        chunks: Wrapped model chunks of this rank.
        """
        self._chunk_of = {p: chunk for chunk in chunks for p in chunk.module.parameters() if p.requires_grad}
        self._chunks = chunks
        self._written: set[Tensor] = set()
        for parameter in self._chunk_of:
            parameter.register_post_accumulate_grad_hook(self._take)

    def begin(self) -> None:
        """Prepare for the first backward of a step."""
        self._written.clear()
        for chunk in self._chunks:
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                group.reset()

    def _take(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        main_grad: Tensor = parameter.main_grad  # type: ignore[attr-defined]  # Megatron-Core gives it to its parameters
        if parameter in self._written:
            main_grad.add_(parameter.grad)
        else:
            self._written.add(parameter)
            main_grad.copy_(parameter.grad)
        parameter.grad = None
        chunk = self._chunk_of[parameter]
        if chunk.ddp_config.overlap_grad_reduce:
            chunk.param_to_bucket_group[parameter].register_grad_ready(parameter, chunk.force_all_reduce)

    def end(self) -> None:
        """Give parameters that no gradient came to (experts without tokens) one of 0, after the last backward."""
        for parameter in self._chunk_of:
            if parameter not in self._written:
                parameter.main_grad.zero_()


def clip_divisor(grad_norm: float, clip: float) -> float:
    """Return the divisor that makes a gradient norm ``clip`` at most. It is 1 if ``clip`` is 0, which means no clipping."""
    return max(1.0, (grad_norm + CLIP_EPS) / clip) if clip > 0 else 1.0


def divide_gradients(optimizers: Sequence[MegatronOptimizer], divisor: float) -> None:
    """Divide the gradients that the optimizers are ready to take. On a CPU the optimizer step divides, since it reads them anyway."""
    for one in optimizers:
        if one.optimizer is None:  # a stage without parameters of this class
            continue
        if isinstance(one.optimizer, Adam):
            one.optimizer.grad_scale = divisor
        else:
            gradients = [p.grad for group in one.optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_div_(gradients, divisor)

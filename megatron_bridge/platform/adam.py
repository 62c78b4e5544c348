"""Adam with FusedAdam's conventions, for machines with neither Transformer Engine nor NVIDIA's apex.

Without these Megatron-Core falls back to ``torch.optim.AdamW``, which keeps a step counter in the state of every parameter. The
checkpoint code of its distributed optimizer expects FusedAdam's layout: ``step`` in the parameter group, and only ``exp_avg`` and
``exp_avg_sq`` in the state. The arithmetic is torch's own functional AdamW, in its fused kernel.
"""

from __future__ import annotations

from typing import Any, overload
from collections.abc import Callable, Iterable

import torch
from torch.optim._functional import adam as functional_adam
from torch.optim.adamw import adamw as functional_adamw


class Adam(torch.optim.Optimizer):
    """Adam (Kingma and Ba 2015), with decoupled weight decay (Loshchilov and Hutter 2019) when ``adam_w_mode``."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode
        #: The next step divides the gradients by it and writes them back. That saves the pass over them that scaling before would take.
        self.grad_scale = 1.0

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        grad_scale = torch.tensor(self.grad_scale)
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            # The functional form increments the counters that it is given, one tensor per parameter. They must lie on the parameters'
            # device: the fused CUDA kernel reads their addresses unchecked.
            steps = torch.full((len(params),), float(group["step"] - 1), device=params[0].device).unbind()
            update = functional_adamw if self.adam_w_mode else functional_adam
            update(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                list(steps),
                foreach=False,
                fused=True,
                capturable=False,
                differentiable=False,
                has_complex=False,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                grad_scale=grad_scale.to(params[0].device),
            )
        return loss


def install_if_needed() -> None:
    """Make Megatron-Core build this Adam where it fell back to torch's own.

    We ask Megatron-Core whether it did, not the installed packages. A package may be present without a usable fused Adam: a Transformer
    Engine built for another torch, or PyPI's ``apex``, which is another project.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.Adam = Adam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = Adam
    distrib_optimizer.HAVE_APEX_OR_TE = True

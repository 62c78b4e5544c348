"""The project's Adam gives torch's fused kernel what a CUDA device can take, and steps as torch does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_bridge.platform import adam
from megatron_bridge.platform.adam import Adam


def test_every_tensor_of_an_update_lies_on_the_parameters_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused CUDA kernel reads addresses of step counters unchecked: one in host memory ends the process."""
    devices: list[set[str]] = []

    def record(*tensors: Any, **options: Any) -> None:
        lists = [one for one in tensors if isinstance(one, list)]
        devices.append({t.device.type for one in lists for t in one} | {options["grad_scale"].device.type})

    monkeypatch.setattr(adam, "functional_adamw", record)
    parameters = [torch.nn.Parameter(torch.empty(3, device="meta")) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.empty(3, device="meta")
    Adam(parameters).step()
    assert devices == [{"meta"}]


def test_steps_are_those_of_torch() -> None:
    ours, theirs = ([torch.nn.Parameter(torch.linspace(-1, 1, 5)), torch.nn.Parameter(torch.ones(2))] for _ in range(2))
    options = {"lr": 0.1, "betas": (0.8, 0.7), "eps": 1e-3, "weight_decay": 0.2}
    optimizers = [Adam(ours, **options), torch.optim.AdamW(theirs, **options)]
    for step in range(3):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            for number, parameter in enumerate(parameters):
                parameter.grad = torch.full_like(parameter, 0.5 * step - number)
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fell_back", [True, False])
def test_adam_takes_torchs_place_alone(fell_back: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that are there, but whose optimizers Megatron-Core could not import, bring no fused Adam."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    fused = type("FusedAdam", (), {})
    for module in (optimizer, distrib_optimizer):
        monkeypatch.setattr(module, "Adam", fused)
    monkeypatch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", fell_back)
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", not fell_back)
    adam.install_if_needed()
    expected = Adam if fell_back else fused
    assert optimizer.Adam is distrib_optimizer.Adam is expected
    assert not optimizer.USING_PYTORCH_OPTIMIZER and distrib_optimizer.HAVE_APEX_OR_TE

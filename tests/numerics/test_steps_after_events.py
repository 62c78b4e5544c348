"""A training step after a save, a load, an export, an evaluation or a weight sync has the bits of a step without it.

On CUDA a checkpoint from host memory moves every parameter's ``data`` to the host and back. torch then drops the node that accumulates the
parameter's gradient, and with it all hooks that hang on the node; on a CPU the device stays, and so does the node. ``moved`` emulates the
move: the same condition in torch's ``set_data`` holds for a change of dtype.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from hetero_ppo.algorithms.losses import Loss
from hetero_ppo.config.schema import (
    DdpConfig,
    Dtype,
    ModelConfig,
    OptimizerConfig,
    ResidencyConfig,
    TrainedRoleConfig,
)
from hetero_ppo.engines.loss_terms import LossTerm
from hetero_ppo.engines.losses import sft_loss_fn
from hetero_ppo.engines.outputs import log_probs_output, values_output
from hetero_ppo.engines.residency import RoleResidency
from hetero_ppo.engines.shared_device import SharedDevice
from hetero_ppo.engines.train_engine import TrainEngine
from hetero_ppo.types import AnswerInputs, Microbatch

pytestmark = pytest.mark.usefixtures("world")

VOCAB, ROWS, LENGTH = 96, 6, 12
#: name -> (dtype, distributed optimizer, overlapped reduction)
OPTIMIZERS = {
    "fp32": (Dtype.fp32, False, False),
    "bf16": (Dtype.bf16, False, False),
    "fp32 distributed": (Dtype.fp32, True, False),
    "fp32 distributed, overlapped": (Dtype.fp32, True, True),
    "bf16 distributed, overlapped": (Dtype.bf16, True, True),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    config = Qwen3Config(vocab_size=VOCAB, num_attention_heads=4, num_key_value_heads=2, **sizes)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Reset accumulating nodes after every ``on_host``, as CUDA does; the roles that it happened to."""
    original, roles = RoleResidency.on_host, list[str]()

    @contextlib.contextmanager
    def on_host(self: RoleResidency) -> Iterator[None]:
        with original(self):
            yield
        roles.append(self.role)
        with torch._C.DisableTorchFunctionSubclass():
            for parameter in self.parameters:
                data = parameter.data
                parameter.data = torch.empty(0, dtype=torch.float64)
                parameter.data = data

    monkeypatch.setattr(RoleResidency, "on_host", on_host)
    return roles


class Role:
    """A trained role on a device that it leaves between turns."""

    def __init__(self, model: Path, name: str, optimizer: str) -> None:
        dtype, distributed, overlapped = OPTIMIZERS[optimizer]
        config = TrainedRoleConfig(
            model=ModelConfig(path=str(model), dtype=dtype),
            optimizer=OptimizerConfig(lr=1e-2, distributed=distributed),
            ddp=DdpConfig(overlap_grad_reduce=overlapped, overlap_param_gather=overlapped),
            micro_batch_size=2,
        )
        self.device = SharedDevice(ResidencyConfig())
        self.engine = TrainEngine(name, config, "lm" if name == "actor" else "value", 10, self.device)
        self.ids = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
        self.lengths = torch.full((ROWS,), LENGTH)

    def step(self) -> list[Tensor]:
        """Take one optimizer step of three micro-batches. Return loss, gradient norm and the new weights."""
        engine = self.engine
        inputs = AnswerInputs(torch.ones(ROWS, LENGTH - 1, dtype=torch.bool))
        with engine.on_device(grads=True, optimizer=True, phase="train"):
            parts = engine.microbatches(self.ids, self.lengths, inputs, range(ROWS))
            assert len(parts) == 3
            loss = sft_loss_fn(VOCAB, engine.groups) if engine.model.head == "lm" else _square_loss
            result = engine.train_step([LossTerm(parts, loss, ROWS * (LENGTH - 1))])
            weights = [tensor.clone() for _, tensor in engine.model.stream_weights()]
        return [torch.tensor([result.loss, result.grad_norm]), *weights]


def _square_loss(output: Tensor, microbatch: Microbatch) -> Loss:
    loss = values_output(output, microbatch).square().sum()
    return Loss(loss, microbatch.inputs.mask.sum().float(), {"loss": loss.detach().double()})


def save(role: Role, folder: Path) -> None:
    snapshot = role.engine.save(_new(folder / "saved"))
    assert snapshot.write()
    snapshot.finish()


def save_and_load(role: Role, folder: Path) -> None:
    save(role, folder)
    with role.engine.on_device(grads=True, optimizer=True, phase="load"):
        role.engine.load(folder / "saved")


def export(role: Role, folder: Path) -> None:
    with role.engine.on_device(phase="export"):
        role.engine.model.export(str(folder / "hf"))


def evaluate(role: Role, folder: Path) -> None:
    head = role.engine.model.head
    output = (
        log_probs_output(temperature=1.0, vocab_size=VOCAB, groups=role.engine.groups)
        if head == "lm"
        else values_output
    )
    with role.engine.on_device(phase="evaluation"):
        role.engine.model.forward(role.ids, role.lengths, output)


def sync(role: Role, folder: Path) -> None:
    with role.engine.on_device(phase="weight_sync"):
        assert list(role.engine.model.stream_weights())


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


EVENTS: list[Callable[[Role, Path], None]] = [save, save_and_load, export, evaluate, sync]


@pytest.mark.parametrize("name", ["actor", "critic"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_event_between_steps_changes_no_bit(
    name: str, optimizer: str, model: Path, tmp_path: Path, moved: list[str]
) -> None:
    role = Role(model, name, optimizer)
    expected = [role.step() for _ in range(len(EVENTS) + 1)]
    role.device.close()
    role = Role(model, name, optimizer)
    for number, step in enumerate(expected):
        for one, other in zip(role.step(), step, strict=True):
            assert torch.equal(one, other), f"step {number + 1} differs"
        if number < len(EVENTS):
            EVENTS[number](role, _new(tmp_path / f"{number}"))
    assert moved == [name, name]  # both saves, and nothing else, take tensors from the host
    role.device.close()

"""Options of the optimizer that differ from the checkpoint's are applied: torch's optimizers would take the old ones back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from hetero_ppo.config.schema import Dtype, ModelConfig, OptimizerConfig, TrainedRoleConfig
from hetero_ppo.engines.loss_terms import LossTerm
from hetero_ppo.engines.losses import sft_loss_fn
from hetero_ppo.engines.train_engine import TrainEngine
from hetero_ppo.types import AnswerInputs

pytestmark = pytest.mark.usefixtures("world")

VOCAB, ROWS, LENGTH = 61, 4, 9
CHANGES = {
    "lr": 3e-2,
    "weight_decay": 0.3,
    "beta1": 0.5,
    "beta2": 0.5,
    "eps": 1e-2,
    "grad_clip": 0.01,
    "decay_norms_and_biases": True,
}


def train(engine: TrainEngine) -> None:
    generator = torch.Generator().manual_seed(engine.steps_done)
    ids = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator)
    mask = AnswerInputs(torch.ones(ROWS, LENGTH - 1, dtype=torch.bool))
    parts = engine.microbatches(ids, torch.full((ROWS,), LENGTH), mask, range(ROWS))
    engine.train_step([LossTerm(parts, sft_loss_fn(VOCAB, engine.groups), ROWS * (LENGTH - 1))])


def weights(engine: TrainEngine) -> list[Tensor]:
    return [tensor.clone() for _, tensor in engine.model.stream_weights()]


@pytest.mark.parametrize(("distributed", "dtype"), [(False, Dtype.fp32), (True, Dtype.fp32), (False, Dtype.bf16)])
def test_the_configuration_decides_and_the_checkpoint_does_not(tmp_path: Path, distributed: bool, dtype: Dtype) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    Qwen3ForCausalLM(
        Qwen3Config(vocab_size=VOCAB, num_attention_heads=2, num_key_value_heads=1, **sizes)
    ).save_pretrained(tmp_path)
    options = OptimizerConfig(lr=1e-2, weight_decay=0.1, distributed=distributed)

    def engine_of(optimizer: OptimizerConfig) -> TrainEngine:
        model = ModelConfig(path=str(tmp_path), dtype=dtype)
        return TrainEngine("actor", TrainedRoleConfig(model=model, optimizer=optimizer), "lm", 10)

    first = engine_of(options)
    train(first)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    snapshot = first.save(folder)
    assert snapshot.write()
    snapshot.finish()
    train(first)

    def resumed(optimizer: OptimizerConfig) -> list[Tensor]:
        engine = engine_of(optimizer)
        engine.load(folder)
        train(engine)
        return weights(engine)

    same = weights(first)
    assert all(torch.equal(a, b) for a, b in zip(resumed(options), same, strict=True))
    for name, value in CHANGES.items():
        changed = resumed(replace(options, **{name: value}))
        assert not all(torch.equal(a, b) for a, b in zip(changed, same, strict=True)), f"{name} is not applied"

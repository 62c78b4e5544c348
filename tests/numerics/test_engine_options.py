"""Options of a trained role against torch: AdamW with every option, the schedule of learning rates, recomputation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from hetero_ppo.config.schema import (
    CriticConfig,
    DdpConfig,
    Dtype,
    HeadedModelConfig,
    HeadInit,
    LrSchedule,
    ModelConfig,
    OptimizerConfig,
    TrainedRoleConfig,
)
from hetero_ppo.engines.loss_terms import LossTerm, TrainStepResult
from hetero_ppo.engines.losses import sft_loss_fn
from hetero_ppo.engines.outputs import log_probs_output
from hetero_ppo.engines.model_engine import ModelEngine
from hetero_ppo.engines.train_engine import TrainEngine
from hetero_ppo.types import AnswerInputs, Microbatch
from megatron_bridge.model.config_mapping import VOCAB_PARTS
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

pytestmark = pytest.mark.usefixtures("world")

VOCAB, ROWS, LENGTH, LAYERS, STEPS = 61, 6, 9, 2, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "head_dim": 8,
        "initializer_range": 0.2,
    }
    Qwen3ForCausalLM(
        Qwen3Config(vocab_size=VOCAB, num_attention_heads=4, num_key_value_heads=2, **sizes)
    ).save_pretrained(folder)
    return folder


def role(model: Path, *, recompute: str | None = None, aligned: bool = False, **optimizer: Any) -> TrainEngine:
    path = ModelConfig(path=str(model))
    config = TrainedRoleConfig(
        path, optimizer=OptimizerConfig(**optimizer), micro_batch_size=3, recompute=recompute, aligned=aligned
    )
    return TrainEngine("actor", config, "lm", STEPS)


def rows_of_step(step: int) -> Tensor:
    return torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))


def our_step(engine: TrainEngine, step: int) -> TrainStepResult:
    mask = torch.ones(ROWS, LENGTH - 1, dtype=torch.bool)
    parts = engine.microbatches(rows_of_step(step), torch.full((ROWS,), LENGTH), AnswerInputs(mask), range(ROWS))
    return engine.train_step([LossTerm(parts, sft_loss_fn(VOCAB, engine.groups), mask.sum().item())])


#: By hand: (step + 1) / 3 of the rate while it warms up; then it stays, or falls in a line to 2e-3 at step 4.
RATES = {
    LrSchedule.constant: [8e-3 / 3, 16e-3 / 3, 8e-3, 8e-3],
    LrSchedule.linear: [8e-3 / 3, 16e-3 / 3, 8e-3, 5e-3],
}


@pytest.mark.parametrize("schedule", RATES)
@pytest.mark.parametrize("distributed", [False, True])
def test_steps_are_those_of_torchs_adam(model: Path, schedule: LrSchedule, distributed: bool) -> None:
    """Betas, epsilon and clipping are not the defaults, and the rate changes from step to step. Weights within 1e-5 of torch's."""
    options: dict[str, Any] = {"beta1": 0.7, "beta2": 0.8, "eps": 1e-3, "grad_clip": 0.5}
    engine = role(
        model,
        lr=8e-3,
        min_lr=2e-3,
        lr_schedule=schedule,
        warmup_steps=2,
        distributed=distributed,
        weight_decay=0.0,
        **options,
    )
    reference = Qwen3ForCausalLM.from_pretrained(model, dtype=torch.float32)
    adam = torch.optim.AdamW(reference.parameters(), 1.0, (0.7, 0.8), eps=1e-3, weight_decay=0.0)
    for step, rate in enumerate(RATES[schedule]):
        result = our_step(engine, step)
        loss, norm = reference_step(reference, adam, rate, step, clip=0.5)
        assert result.learning_rate == pytest.approx(rate)
        assert norm > 0.6 and (result.loss, result.grad_norm) == pytest.approx((loss, norm), rel=1e-4)
    expected = dict(reference.named_parameters())
    for name, weight in engine.model.stream_weights():
        torch.testing.assert_close(weight, expected[name].detach(), rtol=1e-4, atol=1e-5, msg=name)


def reference_step(
    reference: Qwen3ForCausalLM, adam: torch.optim.Optimizer, rate: float, step: int, clip: float = torch.inf
) -> tuple[float, float]:
    ids = rows_of_step(step)
    loss = reference(ids, labels=ids).loss
    for group in adam.param_groups:
        group["lr"] = rate
    adam.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), clip)
    adam.step()
    return loss.item(), norm.item()


@pytest.mark.parametrize("distributed", [False, True])
def test_weight_decay_is_that_of_torch(model: Path, distributed: bool) -> None:
    """One step, of which the decay is most: the matrices are those of AdamW."""
    engine = role(model, lr=1e-2, weight_decay=5.0, distributed=distributed)
    reference = Qwen3ForCausalLM.from_pretrained(model, dtype=torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in reference.named_parameters()}
    defaults = OptimizerConfig()
    betas = (defaults.beta1, defaults.beta2)
    adam = torch.optim.AdamW(reference.parameters(), 1.0, betas, eps=defaults.eps, weight_decay=5.0)
    our_step(engine, 0)
    reference_step(reference, adam, 1e-2, 0, clip=defaults.grad_clip or torch.inf)
    expected = dict(reference.named_parameters())
    matrices = {name: weight for name, weight in engine.model.stream_weights() if weight.dim() == 2}
    assert len(matrices) >= 7 * LAYERS
    for name, weight in matrices.items():
        torch.testing.assert_close(weight, expected[name].detach(), rtol=1e-4, atol=1e-5, msg=name)
        assert float((weight - before[name]).abs().max()) > 0.02, name


@pytest.mark.parametrize(("recompute", "layers", "mlps"), [(None, 1, 1), ("full", 2, 2), ("selective", 1, 2)])
def test_recomputation_computes_again(model: Path, recompute: str | None, layers: int, mlps: int) -> None:
    """Forwards of a layer, and of the MLP in it, for each micro-batch of a training step; in a plain forward there is one."""
    engine = role(model, recompute=recompute)
    calls: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        return lambda *_: calls.update({name: calls.get(name, 0) + 1})

    layer = engine.model.models[0].decoder.layers[1]
    layer.register_forward_pre_hook(count("layer"))
    layer.mlp.register_forward_pre_hook(count("mlp"))
    our_step(engine, 0)
    assert calls == {"layer": 2 * layers, "mlp": 2 * mlps}
    calls.clear()
    with torch.no_grad():
        engine.model.forward(
            rows_of_step(0), torch.full((ROWS,), LENGTH), lambda logits, m: torch.zeros(len(m.token_ids))
        )
    assert calls == {"layer": 2, "mlp": 2}


def test_sizes_of_micro_batches_are_the_roles_own(model: Path) -> None:
    config = TrainedRoleConfig(
        ModelConfig(path=str(model)),
        micro_batch_size=5,
        micro_batch_tokens=70,
        forward_micro_batch_tokens=90,
        packing=False,
    )
    engine = TrainEngine("actor", config, "lm", STEPS)
    assert (engine.training_size.rows, engine.training_size.tokens, engine.model.forward_size.tokens) == (5, 70, 90)
    assert engine.training_size.packed is False
    engine.model.config.packing = True
    assert engine.training_size.packed is engine.model.forward_size.packed is True
    assert ModelEngine("actor", config, "lm").forward_size.tokens == 70


@pytest.mark.parametrize("overlap", [False, True])
def test_gradients_are_reduced_in_buckets_while_others_are_computed(model: Path, overlap: bool) -> None:
    """Only then are there several buckets, each but the last of ``bucket_size`` parameters at least; and parameters are gathered in the
    next forward. Without, the optimizer of the whole rank has them all."""
    ddp = DdpConfig(overlap_grad_reduce=overlap, overlap_param_gather=overlap, bucket_size=3000)
    config = TrainedRoleConfig(ModelConfig(path=str(model)), optimizer=OptimizerConfig(distributed=overlap), ddp=ddp)
    engine = TrainEngine("actor", config, "lm", STEPS)
    (chunk,) = engine.chunks
    sizes = [sum(p.numel() for p in bucket.params_list) for buffer in chunk.buffers for bucket in buffer.buckets]
    assert sum(sizes) == sum(p.numel() for p in engine.model.models[0].parameters())
    assert len(sizes) > 4 and min(sizes[:-1]) >= 3000 and max(sizes) < 9000 if overlap else len(sizes) == 1
    assert bool(chunk.remove_forward_pre_hook_handles) is overlap
    assert isinstance(engine.optimizer.chained_optimizers[0], DistributedOptimizer) is overlap
    assert (engine.model.bridge.transformer.no_sync_func is not None) is overlap


def test_dtype_and_seed_of_a_model(model: Path) -> None:
    heads = []
    for seed in (3, 3, 4):
        config = HeadedModelConfig(path=str(model), dtype=Dtype.bf16, head_init=HeadInit.normal, init_seed=seed)
        engine = TrainEngine("critic", CriticConfig(config), "value", STEPS)
        assert {parameter.dtype for parameter in engine.model.models[0].parameters()} == {torch.bfloat16}
        heads.append(dict(engine.model.stream_weights())["score.weight"].clone())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("aligned", [True, False])
def test_an_aligned_roles_log_probs_are_sums_over_parts_of_the_vocabulary(model: Path, aligned: bool) -> None:
    """The log-probs are, to the bit, sums over each of the parts that tensor-parallel ranks may have, added in their order. Plain ones are torch's."""
    ids, engine, kept = rows_of_step(0), role(model, aligned=aligned), list[Tensor]()
    log_probs = log_probs_output(
        temperature=1.0, vocab_size=VOCAB, groups=engine.groups, num_parts=engine.model.vocab_parts
    )

    def keep(logits: Tensor, microbatch: Microbatch) -> Tensor:
        kept.append(logits.clone())
        return log_probs(logits, microbatch)

    ours = engine.model.forward(ids, torch.full((ROWS,), LENGTH), keep)
    logits = torch.cat(kept, dim=1)[0, :, :VOCAB].view(ROWS, LENGTH, -1)[:, :-1]
    targets = ids[:, 1:, None]
    expected = logits.log_softmax(-1).gather(-1, targets)[..., 0]
    if aligned:
        part = kept[0].shape[-1] // VOCAB_PARTS
        shifted = logits - logits.amax(-1, keepdim=True)
        sums = [shifted[..., start : start + part].exp().sum(-1) for start in range(0, VOCAB, part)]
        assert len(sums) == VOCAB_PARTS
        whole, expected = (
            expected,
            shifted.gather(-1, targets)[..., 0] - (((sums[0] + sums[1]) + sums[2]) + sums[3]).log(),
        )
        assert not torch.equal(whole, expected)
    assert torch.equal(ours, expected)

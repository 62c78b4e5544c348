"""A training step against torch: the gradient is the mean over the minibatch's tokens, clipped, and Adam's step is torch's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hetero_ppo.config.schema import (
    CriticConfig,
    DdpConfig,
    Dtype,
    HeadedModelConfig,
    HeadInit,
    ModelConfig,
    OptimizerConfig,
    TrainedRoleConfig,
)
from hetero_ppo.engines.gradients import clip_divisor
from hetero_ppo.engines.loss_terms import LossFn, LossTerm, TrainStepResult, gradient_scales, step_metrics
from hetero_ppo.engines.losses import sft_loss_fn
from hetero_ppo.algorithms.losses import Loss
from hetero_ppo.engines.train_engine import TrainEngine
from hetero_ppo.step.kinds import TRAINING, Kind
from hetero_ppo.types import AnswerInputs, Microbatch
from megatron_bridge.model_provider import Head

pytestmark = pytest.mark.usefixtures("world")

VOCAB, ROWS, LENGTH = 61, 6, 9


@pytest.mark.parametrize("clip", [0.0, 0.3])
@pytest.mark.parametrize("distributed", [False, True])
def test_three_steps_of_several_micro_batches(tmp_path: Path, clip: float, distributed: bool) -> None:
    """The rows of a step are not those of the last, and in the last one no token of a row counts: a gradient that stayed in a buffer
    would be seen. Weights after three steps within 1e-5, with a learning rate of 1e-2.
    """
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "initializer_range": 0.2,
    }
    config = Qwen3Config(vocab_size=VOCAB, num_attention_heads=4, num_key_value_heads=2, **sizes)
    reference = Qwen3ForCausalLM(config)
    reference.save_pretrained(tmp_path)
    # Rounding makes 4e-8 of a gradient of 0.5, which a small eps would turn into a good part of a step on some CPUs.
    optimizer = OptimizerConfig(lr=1e-2, eps=1e-3, grad_clip=clip, distributed=distributed)
    role = TrainedRoleConfig(model=ModelConfig(path=str(tmp_path)), optimizer=optimizer, micro_batch_size=2)
    engine = TrainEngine("actor", role, "lm", 10)
    adam = torch.optim.AdamW(
        reference.parameters(), optimizer.lr, (optimizer.beta1, optimizer.beta2), optimizer.eps, weight_decay=0.0
    )
    loss_fn = sft_loss_fn(VOCAB, engine.groups)
    for step in range(3):
        ids = torch.randint(0, VOCAB, (ROWS, LENGTH))
        mask = torch.rand(ROWS, LENGTH - 1) < (0.7 if step else 0.4)
        mask[0] = step < 2
        parts = engine.microbatches(ids, torch.full((ROWS,), LENGTH), AnswerInputs(mask), range(ROWS))
        assert len(parts) == 3
        result = engine.train_step([LossTerm(parts, loss_fn, int(mask.sum()))])
        log_probs = reference(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        loss = -log_probs[mask].mean()
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), clip or float("inf"))
        adam.step()
        assert result.terms[0].count == int(mask.sum())
        assert (result.loss, result.grad_norm) == pytest.approx((float(loss), float(norm)), rel=1e-4)
    expected = dict(reference.named_parameters())
    for name, weight in engine.model.stream_weights():
        torch.testing.assert_close(weight, expected[name].detach(), rtol=1e-4, atol=1e-5, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("weights", [(1.0, 0.3), (0.5, 2.0)])
def test_a_step_on_two_terms_is_torchs_on_their_weighted_sum(
    tmp_path: Path, weights: tuple[float, float], overlap: bool
) -> None:
    """Each term has its own rows, number of micro-batches and denominator; the second one's is not its number of tokens.

    Weights after two steps within 1e-5, with a learning rate of 1e-2. ``overlap``: gradients are added up over ranks during the
    backward of the last micro-batch of the last term.
    """
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "initializer_range": 0.2,
    }
    reference = Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCAB, num_attention_heads=4, num_key_value_heads=2, **sizes))
    reference.save_pretrained(tmp_path)
    optimizer = OptimizerConfig(lr=1e-2, eps=1e-3, grad_clip=0.3)
    ddp = DdpConfig(overlap_grad_reduce=overlap)
    role = TrainedRoleConfig(model=ModelConfig(path=str(tmp_path)), optimizer=optimizer, micro_batch_size=2, ddp=ddp)
    engine = TrainEngine("actor", role, "lm", 10)
    adam = torch.optim.AdamW(
        reference.parameters(), optimizer.lr, (optimizer.beta1, optimizer.beta2), optimizer.eps, weight_decay=0.0
    )
    for _ in range(2):
        terms, counts, losses = [], [], []
        for num_rows, weight, denominator in zip((4, 2), weights, (None, 40.0), strict=True):
            ids, mask = torch.randint(0, VOCAB, (num_rows, LENGTH)), torch.rand(num_rows, LENGTH - 1) < 0.7
            parts = engine.microbatches(ids, torch.full((num_rows,), LENGTH), AnswerInputs(mask), range(num_rows))
            counts.append(int(mask.sum()))
            terms.append(LossTerm(parts, sft_loss_fn(VOCAB, engine.groups), denominator or counts[-1], weight))
            log_probs = reference(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            losses.append(-log_probs[mask].sum() / (denominator or counts[-1]))
        result = engine.train_step(terms)
        loss = weights[0] * losses[0] + weights[1] * losses[1]
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.3)
        adam.step()
        assert [term.count for term in result.terms] == counts
        assert [term.loss for term in result.terms] == pytest.approx([float(each) for each in losses], rel=1e-4)
        assert (result.loss, result.grad_norm) == pytest.approx((float(loss), float(norm)), rel=1e-4)
        metrics = step_metrics([dataclasses.replace(result, terms=result.terms[1:])])
        assert metrics == {"sft/loss": pytest.approx(float(losses[1]) * 40 / counts[1], rel=1e-4)}
    expected = dict(reference.named_parameters())
    for name, weight in engine.model.stream_weights():
        torch.testing.assert_close(weight, expected[name].detach(), rtol=1e-4, atol=1e-5, msg=f"{name}: {{}}".format)


def test_scales_of_terms() -> None:
    """The values are worked out by hand: 1 for a term that stands alone, a term without tokens adds nothing and does not divide."""
    parts, loss_fn = cast(Any, None), cast(Any, None)

    def scales(*terms: tuple[float, float]) -> tuple[float, list[float]]:
        return gradient_scales([LossTerm(parts, loss_fn, denominator, weight) for denominator, weight in terms])

    assert scales((7, 1.0)) == (7, [1.0])
    assert scales((8, 1.0), (4, 0.5)) == (8, [1.0, 1.0])
    assert scales((8, 0.5), (32, 2.0)) == (8, [0.5, 0.5])
    assert scales((0, 1.0), (4, 0.5)) == (4, [0.0, 0.5])
    assert scales((0, 1.0)) == (0.0, [0.0])


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize(("dtype", "distributed"), [(Dtype.fp32, False), (Dtype.bf16, True)])
@pytest.mark.parametrize("family", ["biases", "experts"])
def test_weight_decay_leaves_norms_and_biases_alone(
    tmp_path: Path, family: str, dtype: Dtype, distributed: bool, everywhere: bool
) -> None:
    """With gradients of 0 decay is all that a step does: to matrices alone, or to everything; experts and the router too."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    sizes |= {"vocab_size": VOCAB, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"moe_intermediate_size": 24, "num_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}
    model: torch.nn.Module = Qwen2ForCausalLM(Qwen2Config(**sizes))
    if family == "experts":
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.ones_(parameter)
    model.save_pretrained(tmp_path)
    options = {"lr": 0.5, "weight_decay": 0.25, "distributed": distributed, "decay_norms_and_biases": everywhere}
    role = TrainedRoleConfig(ModelConfig(path=str(tmp_path), dtype=dtype), optimizer=OptimizerConfig(**options))
    engine = TrainEngine("actor", role, "lm", 10)
    plain = sft_loss_fn(VOCAB, engine.groups)

    def nothing(output: torch.Tensor, microbatch: Microbatch) -> Loss:
        loss = plain(output, microbatch)
        return dataclasses.replace(loss, loss=0 * loss.loss)

    ids, mask = torch.randint(0, VOCAB, (ROWS, LENGTH)), torch.ones(ROWS, LENGTH - 1, dtype=torch.bool)
    parts = engine.microbatches(ids, torch.full((ROWS,), LENGTH), AnswerInputs(mask), range(ROWS))
    engine.train_step([LossTerm(parts, nothing, int(mask.sum()))])
    before = load_file(tmp_path / "model.safetensors")
    weights = dict(engine.model.stream_weights())
    assert any(("experts" if family == "experts" else ".bias") in name for name in weights)
    for name, weight in weights.items():
        factor = 0.875 if everywhere or weight.dim() > 1 else 1.0
        tolerance = {"rtol": 1e-2, "atol": 0.0} if dtype is Dtype.bf16 else {"rtol": 1e-5, "atol": 0.0}
        torch.testing.assert_close(weight.float(), factor * before[name], **tolerance, msg=name)


@pytest.mark.parametrize(
    ("head", "start", "is_zero"),
    [("value", None, True), ("score", None, False), ("value", HeadInit.normal, False), ("score", HeadInit.zero, True)],
)
def test_a_critic_without_a_head_starts_at_zero(
    tmp_path: Path, head: Head, start: HeadInit | None, is_zero: bool
) -> None:
    """A reward model's starts at random; ``model.head_init`` changes either."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    config = Qwen3Config(vocab_size=VOCAB, num_attention_heads=2, num_key_value_heads=1, **sizes)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    role = CriticConfig(HeadedModelConfig(path=str(tmp_path), head_init=start))
    engine = TrainEngine("critic" if head == "value" else "reward", role, head, 10)
    assert bool(dict(engine.model.stream_weights())["score.weight"].any()) is not is_zero


def test_the_divisor_clips() -> None:
    assert (clip_divisor(7.0, 0.0), clip_divisor(0.5, 1.0), clip_divisor(0.0, 1.0)) == (1.0, 1.0, 1.0)
    assert clip_divisor(4.0, 0.5) == pytest.approx(8.0, rel=1e-5)


def test_steps_with_a_gradient_that_is_not_finite_are_skipped_within_a_bound(tmp_path: Path) -> None:
    """Two in a row are left out, weights and moments as they were; a good step starts the count again; the third in a row stops."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    config = Qwen3Config(vocab_size=VOCAB, num_attention_heads=2, num_key_value_heads=1, **sizes)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    optimizer = OptimizerConfig(lr=1e-2, max_skipped_steps=2)
    engine = TrainEngine("actor", TrainedRoleConfig(ModelConfig(path=str(tmp_path)), optimizer=optimizer), "lm", 10)
    good = sft_loss_fn(VOCAB, engine.groups)
    ids, mask = torch.randint(0, VOCAB, (ROWS, LENGTH)), torch.ones(ROWS, LENGTH - 1, dtype=torch.bool)

    factors = iter(("nan", "inf", "nan", "nan", "inf"))

    def bad(output: torch.Tensor, microbatch: Microbatch) -> Loss:
        loss = good(output, microbatch)
        return dataclasses.replace(loss, loss=loss.loss * float(next(factors)))

    def step(loss_fn: LossFn) -> TrainStepResult:
        parts = engine.microbatches(ids, torch.full((ROWS,), LENGTH), AnswerInputs(mask), range(ROWS))
        return engine.train_step([LossTerm(parts, loss_fn, int(mask.sum()))])

    def state() -> list[torch.Tensor]:
        return [tensor.clone() for kind in TRAINING - {Kind.grads} for tensor in engine.tensors()[kind]]

    for loss_fn, is_skipped in ((good, False), (bad, True), (bad, True), (good, False), (bad, True), (bad, True)):
        before = state()
        result = step(loss_fn)
        assert result.is_skipped is is_skipped and (result.terms[0].count == 0) is is_skipped
        unchanged = all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
        assert unchanged is is_skipped
    before = state()
    with pytest.raises(FloatingPointError, match=r"number 3 in a row \(actor.optimizer.max_skipped_steps=2\)"):
        step(bad)
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))


def test_a_minibatch_without_a_token_to_learn_from_changes_nothing(tmp_path: Path) -> None:
    """All its responses are masked, as those of others are not: the step is counted, weights and moments stay, nothing is NaN."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    config = Qwen3Config(vocab_size=VOCAB, num_attention_heads=2, num_key_value_heads=1, **sizes)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    engine = TrainEngine("actor", TrainedRoleConfig(ModelConfig(path=str(tmp_path))), "lm", 10)
    ids, mask = torch.randint(0, VOCAB, (ROWS, LENGTH)), torch.zeros(ROWS, LENGTH - 1, dtype=torch.bool)

    def state() -> list[torch.Tensor]:
        return [tensor.clone() for kind in TRAINING - {Kind.grads} for tensor in engine.tensors()[kind]]

    before = state()
    parts = engine.microbatches(ids, torch.full((ROWS,), LENGTH), AnswerInputs(mask), range(ROWS))
    result = engine.train_step([LossTerm(parts, sft_loss_fn(VOCAB, engine.groups), 0)])
    assert (result.terms[0].count, result.loss, result.grad_norm, result.is_skipped) == (0, 0.0, 0.0, False)
    assert engine.steps_done == 1 and all(float(total) == 0 for total in result.terms[0].metric_sums.values())
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))

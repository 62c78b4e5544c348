"""Packed or padded, of every token or of those that an output mask selects: the same log-probs, values, scores and gradients, those of transformers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from hetero_ppo.algorithms.masking import response_mask
from hetero_ppo.config.schema import Dtype, ModelConfig, OptimizerConfig, TrainedRoleConfig
from hetero_ppo.engines.loss_terms import LossTerm
from hetero_ppo.engines.losses import sft_loss_fn
from hetero_ppo.engines.microbatches import sequence_ends, split
from hetero_ppo.engines.model_input import model_inputs
from hetero_ppo.engines.outputs import log_probs_output, scores_output, values_output
from hetero_ppo.engines.train_engine import TrainEngine
from hetero_ppo.types import AnswerInputs
from megatron_bridge.model import config_mapping, context_parallel
from megatron_bridge.model.context_parallel import attend, needs_whole_heads
from megatron_bridge.model.layers import ShortSequenceSelfAttention
from megatron_bridge.model.packing import attend_packed, by_group, pack, unpack

# isort: split
from megatron.core.models.common.embeddings import rope_utils

pytestmark = pytest.mark.usefixtures("world")

VOCAB = 61
LENGTHS = torch.tensor([40, 7, 23, 3, 37, 24, 2, 39])
PROMPTS = torch.tensor([20, 3, 4, 1, 30, 20, 1, 4])
MASK = response_mask(PROMPTS, LENGTHS, 39)
OUTPUT_MASK = pad(MASK, (0, 1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "initializer_range": 0.2,
    }
    config = Qwen3Config(vocab_size=VOCAB, num_attention_heads=4, num_key_value_heads=2, **sizes)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """[8, 40]; what lies behind the sequences is not 0, so whoever reads it is seen."""
    return torch.randint(0, VOCAB, (8, 40), generator=torch.Generator().manual_seed(1))


def engine(model: Path, dtype: Dtype, head: str, *, packing: bool, tokens: int | None = None) -> TrainEngine:
    config = TrainedRoleConfig(
        model=ModelConfig(path=str(model), dtype=dtype),
        optimizer=OptimizerConfig(lr=1e-2),
        micro_batch_size=3,
        micro_batch_tokens=tokens,
        packing=packing,
    )
    return TrainEngine("actor", config, head, 10)


def log_probs(role: TrainEngine, ids: Tensor, output_mask: Tensor | None) -> Tensor:
    output = log_probs_output(temperature=0.7, vocab_size=VOCAB, groups=role.groups)
    return role.model.forward(ids, LENGTHS, output, output_mask)[MASK]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("tokens", [None, 64])
def test_log_probs_are_those_of_transformers(model: Path, ids: Tensor, packing: bool, tokens: int | None) -> None:
    reference = Qwen3ForCausalLM.from_pretrained(model)
    with torch.no_grad():
        logits = torch.cat([pad(reference(row[None, :n]).logits, (0, 0, 0, 40 - n)) for row, n in zip(ids, LENGTHS)])
    expected = (logits[:, :-1] / 0.7).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0][MASK]
    role = engine(model, Dtype.fp32, "lm", packing=packing, tokens=tokens)
    for output_mask in (None, OUTPUT_MASK):
        torch.testing.assert_close(log_probs(role, ids, output_mask), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(Dtype.fp32, 1e-5), (Dtype.bf16, 0.05)])
def test_packed_values_scores_and_gradients_are_the_padded_ones(
    model: Path, ids: Tensor, dtype: Dtype, tolerance: float
) -> None:
    """bf16 rounds to 1 in 256, and the two ways add up attention in another order."""
    ends = sequence_ends(LENGTHS, 40)
    results = []
    for packing in (False, True):
        scalar = engine(model, dtype, "value", packing=packing, tokens=96)
        values = scalar.model.forward(ids, LENGTHS, values_output, OUTPUT_MASK)[MASK]
        scores = [scalar.model.forward(ids, LENGTHS, scores_output, output_mask) for output_mask in (None, ends)]
        torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=tolerance)
        lm = engine(model, dtype, "lm", packing=packing, tokens=96)
        parts = lm.microbatches(ids, LENGTHS, AnswerInputs(MASK), range(8))
        step = lm.train_step([LossTerm(parts, sft_loss_fn(VOCAB, lm.groups), int(MASK.sum()))])
        gradient = torch.cat([p.main_grad.flatten() for p in lm.model.models[0].parameters()])
        results.append((values, scores[0], torch.tensor([step.loss, step.grad_norm]), gradient))
    scale = float(results[0][3].abs().max())
    for padded, packed in zip(*results):
        torch.testing.assert_close(packed, padded, rtol=tolerance, atol=tolerance * max(1.0, scale))


def test_the_head_computes_wanted_tokens_alone(model: Path, ids: Tensor) -> None:
    """Rows that the head and the last layer's MLP see, and the tokens of the layers below: up to the last selected token of each row."""
    seen: dict[str, int] = {}
    for packing in (False, True):
        role = engine(model, Dtype.fp32, "lm", packing=packing, tokens=1024)
        chunk = role.model.models[0]
        chunk.output_layer.register_forward_hook(lambda _m, given, _o: seen.update(head=given[0].shape[:2].numel()))
        chunk.decoder.layers[0].mlp.register_forward_hook(
            lambda _m, given, _o: seen.update(body=given[0].shape[:2].numel())
        )
        chunk.decoder.layers[-1].mlp.register_forward_hook(
            lambda _m, given, _o: seen.update(last=given[0].shape[:2].numel())
        )
        log_probs(role, ids, OUTPUT_MASK)
        count = int(MASK.sum())
        assert seen == {"head": count, "last": count, "body": int((LENGTHS - 1).sum()) if packing else 8 * 39}


def test_a_micro_batch_without_padding_is_not_packed(model: Path, ids: Tensor) -> None:
    """20 tokens of 20, 19 and 19: 60 padded against 58; and 20, 15 and 10."""
    role = engine(model, Dtype.fp32, "lm", packing=True)
    for lengths, packed in (([20, 19, 19], False), ([20, 15, 10], True)):
        ((_, microbatch),) = split(ids, torch.tensor(lengths), None, range(3), role.model.forward_size)
        settings = {"cp_group": role.groups.cp, "device": torch.device("cpu"), "one_shape": False}
        (given,) = model_inputs([microbatch], role.model.forward_size, **settings)
        assert (given.packing is not None) == packed
        assert given.token_ids.shape == ((1, 45) if packed else (3, 20)) and len(given.head_rows) == sum(lengths)


def test_the_head_of_a_bf16_model_computes_a_multiple(model: Path, ids: Tensor) -> None:
    """oneDNN keeps a product for every shape that comes: 5 selected tokens become 64, and so does none; of 48 there are no more."""
    role = engine(model, Dtype.bf16, "lm", packing=True)
    for lengths, columns, expected in (([40, 39, 38], [5, 9, 37], 64), ([40, 39, 38], [], 64), ([9, 9, 9], [1], 48)):
        output_mask = torch.zeros(3, 40, dtype=torch.bool)
        output_mask[:, columns] = True
        ((_, microbatch),) = split(ids, torch.tensor(lengths), None, range(3), role.model.forward_size, output_mask)
        settings = {"cp_group": role.groups.cp, "device": torch.device("cpu"), "one_shape": False}
        (given,) = model_inputs([microbatch], role.model.forward_size, **settings)
        assert len(given.head_rows.unique()) == len(given.head_rows) == min(expected, given.token_ids.numel())
        assert int(given.head_rows.max()) < given.token_ids.numel()
        assert bool(given.microbatch.output_mask[:, columns].all())


def test_groups_attend_within_sequences_alone() -> None:
    """Against attention to each sequence by itself, forward and backward, with a fill at the end that nobody reads."""
    torch.manual_seed(0)
    lengths, total = [5, 16, 4, 15, 1], 48
    packing = pack(lengths, total, torch.device("cpu"), grid=4)
    assert packing.cu_seqlens_q.tolist() == [0, 5, 21, 25, 40, 41, 48] and packing.max_seqlen_q == 16
    assert [group.shape for group in packing.groups] == [(16, 2), (8, 2), (4, 1)]
    query, key, value = (torch.randn(total, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    out = attend_packed(query, key, value, None, packing)
    weights = torch.randn_like(out)
    weights[41:] = 0
    found = torch.autograd.grad((out * weights).sum(), (query, key, value))
    cuts = torch.tensor([*lengths, 7]).tolist()
    parts = zip(*(tensor.split(cuts) for tensor in (query, key, value)))
    alone = torch.cat([attend(q[:, None], k[:, None], v[:, None], None)[:, 0] for q, k, v in parts])
    torch.testing.assert_close(out[:41], alone[:41], rtol=0, atol=1e-6)
    assert not out[41:].any()
    for one, other in zip(found, torch.autograd.grad((alone * weights).sum(), (query, key, value))):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert torch.equal(by_group(lambda part: part, [query], packing)[:41], query[:41])
    assert unpack(query, packing)[1].shape == (8, 2, 4, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mscale", [1.0, 1.2])
def test_packed_rotation_has_the_bits_of_megatrons(dtype: torch.dtype, mscale: float) -> None:
    """Also where there are as many positions as tokens, which Megatron-Core's function takes for angles of the tokens in turn."""
    lengths, total = [5, 16, 1, 15], 48
    packing = pack(lengths, total, torch.device("cpu"))
    assert packing.positions.tolist() == [*range(5), *range(16), 0, *range(15), *range(11)]
    frequencies = 10_000.0 ** -(torch.arange(6) / 6).repeat(2)
    angles = (torch.arange(40)[:, None] * frequencies)[:, None, None]
    heads = torch.randn(total, 3, 12, dtype=dtype, generator=torch.Generator().manual_seed(0))
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    expected = rope_utils._apply_rotary_pos_emb_thd(heads, packing.cu_seqlens_q, angles, mscale=mscale, cp_group=group)
    found = rope_utils._apply_rotary_pos_emb_bshd(heads[:, None], packing.angles(angles), mscale=mscale)[:, 0]
    assert torch.equal(found, expected)
    assert packing.angles(angles) is packing.angles(angles)
    assert torch.equal(packing.angles(2 * angles), 2 * packing.angles(angles))


class ScalarsRead(TorchDispatchMode):
    """Count of the tensors whose value the host has asked for, each of which is a wait for the device."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [Dtype.fp32, Dtype.bf16])
def test_a_packed_forward_asks_the_device_nothing(
    model: Path, ids: Tensor, dtype: Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tolist(), item(), int() or nonzero() between the model's inputs and its output, nor in the backward."""
    monkeypatch.setattr(ShortSequenceSelfAttention, "MAX_SEQUENCE", 32)  # of bf16 both ways are taken
    lists: list[Tensor] = []
    to_list = Tensor.tolist
    role = engine(model, dtype, "lm", packing=True, tokens=1024)
    (chunk,) = role.model.models
    for longest in (30, 40):
        ((_, microbatch),) = split(ids, torch.tensor([longest, 9, 5, 3, 2, 2]), None, range(6), role.model.forward_size)
        settings = {"cp_group": role.groups.cp, "device": torch.device("cpu"), "one_shape": False}
        (given,) = model_inputs([microbatch], role.model.forward_size, **settings)
        assert given.packing is not None
        with ScalarsRead() as scalars, monkeypatch.context() as patch:
            patch.setattr(Tensor, "tolist", lambda self: lists.append(self) or to_list(self))
            output = chunk(given.token_ids, torch.zeros_like(given.token_ids), None, packed_seq_params=given.packing)
            output.float().square().mean().backward()
        assert lists == [] and scalars.count == 0
    with ScalarsRead() as scalars:
        int(given.packing.cu_seqlens_q[-1])
    assert scalars.count == 1


def test_transformer_engine_rotates_packed_tokens_in_one_kernel(
    model: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stub takes the kernel's place: it gets every token's own angles, as a sequence of one row, and the outputs are the same."""
    calls: list[tuple[torch.Size, torch.Size]] = []

    def fused(heads: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
        calls.append((heads.shape, angles.shape))
        return rope_utils._apply_rotary_pos_emb_bshd(heads, angles)

    expected = log_probs(engine(model, Dtype.fp32, "lm", packing=True, tokens=1024), ids, None)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", fused)
    monkeypatch.setattr(config_mapping, "uses_transformer_engine", lambda dtype: True)
    role = engine(model, Dtype.fp32, "lm", packing=True, tokens=1024)
    assert role.model.bridge.transformer.apply_rope_fusion
    assert torch.equal(log_probs(role, ids, None), expected)
    total = int(LENGTHS.sum())
    assert calls == 2 * [((total, 1, heads, 8), (total, 1, 1, 8)) for heads in (4, 2)]


def test_float32_on_cuda_attends_with_whole_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's only float32 kernel on CUDA without s x s scores takes no groups; values and gradients are those of grouped heads."""
    assert not needs_whole_heads(torch.zeros(1))
    for dtype, whole in ((torch.float32, True), (torch.bfloat16, False)):
        assert needs_whole_heads(SimpleNamespace(is_cuda=True, dtype=dtype)) is whole
    torch.manual_seed(0)
    query, key, value = (torch.randn(s, 2, heads, 8, requires_grad=True) for s, heads in ((6, 6), (9, 2), (9, 2)))
    given: list[tuple[int, bool]] = []
    attention = F.scaled_dot_product_attention

    def recorded(q: Tensor, k: Tensor, v: Tensor, *, enable_gqa: bool, **settings: Any) -> Tensor:
        given.append((k.shape[1], v.shape[1], enable_gqa))
        return attention(q, k, v, enable_gqa=enable_gqa, **settings)

    monkeypatch.setattr(context_parallel, "F", SimpleNamespace(scaled_dot_product_attention=recorded))
    results = []
    for whole in (False, True):
        monkeypatch.setattr(context_parallel, "needs_whole_heads", lambda query, whole=whole: whole)
        for past in (6, 9):
            out = attend(query, key[:past], value[:past], None)
            results.append((out, *torch.autograd.grad(out.square().sum(), (query, key, value))))
    assert given == [(2, 2, True)] * 2 + [(6, 6, False)] * 2
    for grouped, expanded in zip(results[:2], results[2:]):
        for one, other in zip(grouped, expanded):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)

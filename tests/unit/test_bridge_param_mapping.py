"""Split and merge rules on numbers that can be followed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_bridge.families import decoder
from megatron_bridge.families.registry import FAMILIES
from megatron_bridge.families.param_mapping import (
    Dims,
    Entry,
    ExpertLayout,
    Sharding,
    PipelineLayout,
    Rule,
    check_tensor_parallel,
    entries,
    merge,
    padded_vocab_size,
    shard,
)

#: 4 query heads of 2 channels in 2 groups, hidden 3, feed-forward 4, vocabulary of 5 in 8 rows.
DIMS = Dims(hidden=3, ffn=4, query=8, key=4, head_dim=2, num_query_groups=2, vocab=5, padded_vocab=8, num_experts=4)
GATE_UP, DOWN = decoder.MLP_AND_NORMS[0], decoder.MLP_AND_NORMS[1]


def _entries(model_type: str, layout: PipelineLayout, output: Rule | None, ep_size: int = 1) -> list[Entry]:
    family = FAMILIES[model_type]
    experts = ExpertLayout(4 if family.expert_rules else 0, ep_size)
    ends = {"embedding": decoder.EMBEDDING, "final_norm": decoder.FINAL_NORM, "output": output}
    return list(entries(family.layer_rules, family.expert_rules, layout, experts, **ends))


def test_qkv_is_interleaved_by_query_group() -> None:
    q, k, v = torch.arange(8), 10 + torch.arange(4), 20 + torch.arange(4)
    whole = shard(decoder.QKV_BIAS, DIMS, [q, k, v], 0, 1)
    assert whole.tolist() == [0, 1, 2, 3, 10, 11, 20, 21, 4, 5, 6, 7, 12, 13, 22, 23]
    assert shard(decoder.QKV_BIAS, DIMS, [q, k, v], 0, 2).tolist() == whole[:8].tolist()
    assert shard(decoder.QKV_BIAS, DIMS, [q, k, v], 1, 2).tolist() == whole[8:].tolist()


def test_gate_and_up_are_joined_on_each_rank() -> None:
    gate, up = torch.arange(4)[:, None].expand(4, 3), 10 + torch.arange(4)[:, None].expand(4, 3)
    assert shard(GATE_UP, DIMS, [gate, up], 0, 2)[:, 0].tolist() == [0, 1, 10, 11]
    assert shard(GATE_UP, DIMS, [gate, up], 1, 2)[:, 0].tolist() == [2, 3, 12, 13]


def test_row_parallel_divides_the_columns() -> None:
    weight = torch.arange(12).reshape(3, 4)
    assert torch.equal(shard(DOWN, DIMS, [weight], 1, 2), weight[:, 2:])


def test_aligned_row_parallel_divides_the_rows() -> None:
    rule = replace(decoder.ATTENTION_OUTPUT, kind=Sharding.OUTPUT)
    weight = torch.randn(rule.hf[0].shape(replace(DIMS, hidden=4)))
    shards = [shard(rule, replace(DIMS, hidden=4), [weight], rank, 2) for rank in range(2)]
    assert torch.equal(shards[1], weight[2:])
    assert torch.equal(merge(rule, DIMS, shards)[0], weight)


def test_vocabulary_is_padded_with_zeros() -> None:
    weight = torch.arange(1, 16).reshape(5, 3)
    first, second = (shard(decoder.EMBEDDING, DIMS, [weight], rank, 2) for rank in range(2))
    assert torch.equal(first, weight[:4])
    assert second.tolist() == [[13, 14, 15], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    last = shard(decoder.EMBEDDING, DIMS, [weight], 3, 4)  # a rank of padding alone
    assert last.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert torch.equal(merge(decoder.EMBEDDING, DIMS, [first, second])[0], weight)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_merge_undoes_shard(model_type: str, tp_size: int) -> None:
    layout = PipelineLayout(num_layers=1, pp_size=1)
    generator = torch.Generator().manual_seed(0)
    for entry in _entries(model_type, layout, decoder.SCORE_HEAD):
        tensors = [torch.randn(hf.shape(DIMS), generator=generator) for hf in entry.rule.hf]
        shards = [shard(entry.rule, DIMS, tensors, rank, tp_size) for rank in range(tp_size)]
        assert len({part.shape for part in shards}) == 1
        merged = merge(entry.rule, DIMS, shards)
        assert len(merged) == len(tensors)
        assert all(torch.equal(a, b) for a, b in zip(merged, tensors)), entry.hf_names


def test_layer_numbers_go_round_the_pipeline_ranks() -> None:
    layout = PipelineLayout(num_layers=8, pp_size=2, vp_size=2)
    held = {
        (rank, chunk): [layout.global_layer(rank, chunk, local) for local in range(layout.layers_per_chunk)]
        for rank in range(2)
        for chunk in range(2)
    }
    assert held == {(0, 0): [0, 1], (1, 0): [2, 3], (0, 1): [4, 5], (1, 1): [6, 7]}
    assert [layout.locate(layer) for layer in (0, 3, 4, 7)] == [(0, 0, 0), (1, 0, 1), (0, 1, 0), (1, 1, 1)]
    assert all(layout.global_layer(*layout.locate(layer)) == layer for layer in range(8))
    assert layout.last == (1, 1)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_entries_are_in_state_dict_order(model_type: str) -> None:
    layout = PipelineLayout(num_layers=2, pp_size=2)
    plan = _entries(model_type, layout, None)
    names = [name for entry in plan for name in entry.hf_names]
    assert names[0] == "model.embed_tokens.weight" and names[-1] == "model.norm.weight"
    assert [name.split(".")[2] for name in names[1:-1]] == sorted(name.split(".")[2] for name in names[1:-1])
    assert len(set(names)) == len(names)
    second = [entry for entry in plan if entry.hf_prefix == "model.layers.1."]
    assert {(entry.pp_rank, entry.megatron_prefix) for entry in second} == {(1, "decoder.layers.0.")}


def test_experts_lie_in_blocks() -> None:
    """4 experts on 2 ranks: 0 and 1 on the first, 2 and 3 on the second, whole, and everything else on both."""
    plan = _entries("qwen3_moe", PipelineLayout(num_layers=1, pp_size=1), None, ep_size=2)
    third = [entry for entry in plan if entry.hf_prefix == "model.layers.0.mlp.experts.2."]
    assert [name for entry in third for name in entry.hf_names] == [
        f"model.layers.0.mlp.experts.2.{kind}_proj.weight" for kind in ("gate", "up", "down")
    ]
    assert third[0].megatron_names == ["decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight"]
    assert [[entry.is_on(0, rank) for rank in (0, 1)] for entry in third] == [[False, True]] * 2
    assert sum(entry.is_on(0, 0) for entry in plan) == len(plan) - 4  # 2 experts are elsewhere, 2 parameters each


def test_padded_vocab_size() -> None:
    assert [padded_vocab_size(131, multiple) for multiple in (1, 2, 64, 131)] == [131, 132, 192, 131]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": 8, "num_query_groups": 2, "ffn": 64}, "tensor parallelism 4 exceeds num_key_value_heads 2"),
        (
            {"heads": 12, "num_query_groups": 6, "ffn": 64},
            "num_key_value_heads 6 is not a multiple of tensor parallelism 4",
        ),
        ({"heads": 8, "num_query_groups": 4, "ffn": 66}, "intermediate_size 66 is not a multiple"),
    ],
)
def test_tensor_parallelism_that_does_not_divide(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tensor_parallel(4, **sizes)

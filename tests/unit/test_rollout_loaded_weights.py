"""A server's parameters are cut back into the checkpoint's tensors and compared with what was sent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hetero_ppo.rollout.weights.loaded_weights import compare_pieces, dense_pieces, expert_pieces, part_of
from hetero_ppo.rollout.weights.tensor_bytes import tensor_checksum

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


class FusedLayer(nn.Module):
    """Query, key and value as vLLM holds them: one matrix, with the sizes of its parts."""

    def __init__(self, parts: list[Tensor]) -> None:
        super().__init__()
        self.output_partition_sizes = [part.shape[0] for part in parts]
        self.weight = nn.Parameter(torch.cat(parts))
        self.bias = nn.Parameter(torch.cat([part[:, 0] for part in parts]))


def checksums(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: tensor_checksum(tensor.contiguous()) for name, tensor in tensors.items()}


def sent_attention() -> dict[str, Tensor]:
    torch.manual_seed(0)
    sent = {
        f"m.attn.{part}.weight": torch.randn(rows, 6) for part, rows in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4))
    }
    return sent | {name.replace("weight", "bias"): tensor[:, 0].clone() for name, tensor in sent.items()}


def test_a_changed_bit_of_a_fused_parameter_names_the_tensor() -> None:
    sent = sent_attention()
    layer = FusedLayer([tensor for name, tensor in sent.items() if name.endswith("weight")])
    pieces = dense_pieces("m.attn.qkv_proj", layer, PACKED)
    assert compare_pieces(pieces, sent, checksums(sent)) == dict.fromkeys(sent, False)
    layer.weight.data[9, 3].view(torch.int32).bitwise_xor_(1)  # row 1 of the key
    layer.bias.data[15] += 1  # the last of the value
    found = compare_pieces(pieces, sent, checksums(sent))
    assert {name for name, differs in found.items() if differs} == {"m.attn.k_proj.weight", "m.attn.v_proj.bias"}


def test_swapped_parts_are_both_wrong() -> None:
    sent = sent_attention()
    q, k, v = (sent[f"m.attn.{part}.weight"] for part in PACKED["qkv_proj"])
    found = compare_pieces(dense_pieces("m.attn.qkv_proj", FusedLayer([q, v, k]), PACKED), sent, checksums(sent))
    assert {name for name, differs in found.items() if differs and name.endswith("weight")} == {
        "m.attn.k_proj.weight",
        "m.attn.v_proj.weight",
    }


def test_parameters_that_a_kernel_took_away_are_not_read() -> None:
    layer = nn.Linear(3, 2, bias=False)
    layer.weight = nn.Parameter(torch.empty(0))
    assert dense_pieces("m.o_proj", layer, PACKED) == {}


def test_experts_are_read_one_by_one() -> None:
    torch.manual_seed(1)
    shapes = {"gate_proj": (5, 4), "up_proj": (5, 4), "down_proj": (4, 5)}
    sent = {f"m.mlp.experts.{e}.{part}.weight": torch.randn(shape) for e in range(3) for part, shape in shapes.items()}
    layer = nn.Module()
    stacks = {part: torch.stack([sent[f"m.mlp.experts.{e}.{part}.weight"] for e in range(3)]) for part in shapes}
    layer.w13_weight = nn.Parameter(torch.cat([stacks["gate_proj"], stacks["up_proj"]], dim=1))
    layer.w2_weight = nn.Parameter(stacks["down_proj"])
    pieces = expert_pieces("m.mlp.experts.routed_experts", layer)
    assert compare_pieces(pieces, sent, checksums(sent)) == dict.fromkeys(sent, False)
    layer.w13_weight.data[2, 7, 1] = 0.0
    found = compare_pieces(pieces, sent, checksums(sent))
    assert [name for name, differs in found.items() if differs] == ["m.mlp.experts.2.up_proj.weight"]


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_parts_of_tensor_parallel_ranks(rank: int) -> None:
    full = torch.arange(48.0).view(8, 6)
    assert torch.equal(part_of(full, (2, 6), rank, 4, padded=False), full[2 * rank : 2 * rank + 2])  # column-parallel
    columns = torch.arange(48.0).view(6, 8)
    # Row-parallel.
    assert torch.equal(part_of(columns, (6, 2), rank, 4, padded=False), columns[:, 2 * rank : 2 * rank + 2])
    shared = rank // 2  # two key heads over four ranks: each is held twice
    assert torch.equal(part_of(full, (4, 6), rank, 4, padded=False), full[4 * shared : 4 * shared + 4])
    # A vocabulary of 8 in 12 rows.
    assert torch.equal(part_of(full, (3, 6), rank, 4, padded=True), full[3 * rank : 3 * rank + 3])


def test_a_part_is_compared_without_its_padding() -> None:
    sent = {"embed.weight": torch.randn(8, 6)}
    held = torch.zeros(5, 6)
    held[:3] = sent["embed.weight"][5:]
    assert compare_pieces({"embed.weight": held}, sent, checksums(sent), rank=1, size=2, padded=True) == {
        "embed.weight": False
    }
    held[2, 5] += 1
    assert compare_pieces({"embed.weight": held}, sent, checksums(sent), rank=1, size=2, padded=True) == {
        "embed.weight": True
    }

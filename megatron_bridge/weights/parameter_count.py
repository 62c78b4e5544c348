"""Count the parameters that every rank of a layout holds, with the rules that load them, on torch's meta device.

This needs no weights, no process group and no device. Shapes come from ``param_mapping.shard``, so the counts always agree with what is
loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from megatron_bridge.families.param_mapping import Dims, Entry, Sharding, Rule, shard
from megatron_bridge.model.config_mapping import BridgeConfig
from megatron_bridge.weights.weight_plan import exported_entries, loaded_entries

#: Modules in the order of ``named_parameters`` in Megatron-Core's local layer spec. Buffers are laid out in this order.
_CHUNK_ORDER = ("embedding.word_embeddings", "decoder.layers", "decoder.final_layernorm", "output_layer")
_LAYER_ORDER = (
    "input_layernorm",
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "pre_mlp_layernorm",
    "mlp.router",
    "mlp.experts",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


@dataclass(frozen=True)
class LocalParameter:
    """One parameter as one rank holds it."""

    name: str  # name in its chunk, by the local layer spec
    numel: int
    tensor_sharded: bool  # True: every tensor-parallel rank has its own part; False: all have the same
    shared_embedding: bool  # True: tied, and held by the first and the last pipeline stage
    expert: bool = False  # True: part of an expert, whole on one expert-parallel rank, with separate gradient buffers


@dataclass(frozen=True)
class ParameterCount:
    """Number of parameters of one rank."""

    replicated: int  # the same numbers on every tensor-parallel rank
    tensor_sharded: int

    @property
    def total(self) -> int:
        return self.replicated + self.tensor_sharded


def local_parameters(bridge: BridgeConfig, head: str, pp_rank: int) -> list[list[LocalParameter]]:
    """List the parameters of every model chunk on a rank of one pipeline stage, in the order of ``named_parameters``.

    Args:
        bridge: Mapped config and layout.
        head: "lm", "value" or "score".
        pp_rank: Pipeline stage, from 0. All ranks of a stage hold parameters of the same sizes; the list has those of the first experts.

    Raises:
        ValueError: The head is unknown.
    """
    layout = bridge.pipeline_layout
    tied = head == "lm" and bridge.tie_word_embeddings and layout.pp_size > 1
    chunks: list[list[LocalParameter]] = [[] for _ in range(layout.vp_size)]
    for entry in loaded_entries(bridge, head):
        if entry.is_on(pp_rank, ep_rank=0):
            chunks[entry.chunk].append(_local_parameter(entry, bridge, tied))
    return [sorted(chunk, key=lambda parameter: _place(parameter.name)) for chunk in chunks]


def count_parameters(bridge: BridgeConfig, head: str) -> list[ParameterCount]:
    """Count the parameters of one rank of every pipeline stage, in stage order.

    Raises:
        ValueError: The head is unknown.
    """
    counts = []
    for pp_rank in range(bridge.pipeline_layout.pp_size):
        parameters = [p for chunk in local_parameters(bridge, head, pp_rank) for p in chunk]
        sharded = sum(p.numel for p in parameters if p.tensor_sharded)
        counts.append(ParameterCount(sum(p.numel for p in parameters) - sharded, sharded))
    return counts


def hf_tensor_sizes(bridge: BridgeConfig, head: str) -> dict[str, int]:
    """Return name -> number of elements of every Hugging Face tensor, without padding. Their sum is the model's number of parameters.

    Raises:
        ValueError: The head is unknown.
    """
    return {
        name: torch.Size(tensor.shape(bridge.dims)).numel()
        for entry in exported_entries(bridge, head)
        for name, tensor in zip(entry.hf_names, entry.rule.hf)
    }


def _local_parameter(entry: Entry, bridge: BridgeConfig, tied: bool) -> LocalParameter:
    expert = entry.ep_rank is not None
    tp_size = 1 if expert else bridge.transformer.tensor_model_parallel_size
    return LocalParameter(
        name=entry.megatron_names[0],
        numel=_local_numel(entry.rule, bridge.dims, tp_size),
        tensor_sharded=entry.rule.kind is not Sharding.REPLICATED and not expert,
        shared_embedding=tied and entry.rule.kind is Sharding.VOCAB,
        expert=expert,
    )


@cache
def _local_numel(rule: Rule, dims: Dims, tp_size: int) -> int:
    tensors = [torch.empty(tensor.shape(dims), device="meta") for tensor in rule.hf]
    return shard(rule, dims, tensors, 0, tp_size).numel()


def _place(name: str) -> tuple[int, int, int, int, bool]:
    """Return the sort key: place of the module in the chunk, layer, place of the module in the layer, expert, bias after weight.

    Parameters with the same key stay in the order of the rules.
    """
    in_chunk = _first_match(_CHUNK_ORDER, name)
    if _CHUNK_ORDER[in_chunk] != "decoder.layers":
        return in_chunk, 0, 0, 0, False
    layer, _, module = name.removeprefix("decoder.layers.").partition(".")
    place = _first_match(_LAYER_ORDER, module)
    expert = int(module.removeprefix("mlp.experts.local_experts.").partition(".")[0]) if "experts" in module else 0
    return in_chunk, int(layer), place, expert, name.endswith(".bias")


def _first_match(order: Sequence[str], name: str) -> int:
    places = [place for place, module in enumerate(order) if name.startswith(module + ".")]
    assert len(places) == 1, f"{name} has no place among {', '.join(order)}"
    return places[0]

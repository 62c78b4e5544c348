"""Rules that turn Hugging Face tensors into Megatron-Core parameters and back. They use no files and no collectives.

A rule connects one Megatron parameter with the Hugging Face tensors that it holds. The part of such a tensor that a tensor-parallel
rank needs is one contiguous block of rows or columns, so a loader reads only what it keeps.

Megatron layouts (Shoeybi et al. 2019, "Megatron-LM"):

* ``linear_qkv``: rows grouped by query group, each group ``[its query heads; its key head; its value head]``;
* ``linear_fc1``: on each rank ``[its gate rows; its up rows]``;
* vocabulary matrices: rows padded with zeros to the padded vocabulary, then divided among the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor


class Sharding(Enum):
    """Ways to divide a parameter over the tensor-parallel ranks and to join it from its Hugging Face tensors."""

    REPLICATED = "replicated"
    ROW = "row"  # columns are divided: the input dimension of a row-parallel layer
    OUTPUT = "output"  # rows are divided: an aligned model uses it instead of ROW
    QKV = "qkv"
    GATE_UP = "gate_up"
    VOCAB = "vocab"


@dataclass(frozen=True)
class Dims:
    """Sizes of the whole model, as the rules need them."""

    hidden: int
    ffn: int  # inner size of a dense MLP, or of one expert
    query: int  # attention heads x head_dim
    key: int  # query groups x head_dim
    head_dim: int
    num_query_groups: int
    vocab: int  # rows of the checkpoint's embedding
    padded_vocab: int  # rows of the Megatron embedding over all tensor-parallel ranks
    labels: int = 1  # outputs of a value or score head
    num_experts: int = 0  # 0: a dense model


@dataclass(frozen=True)
class HfTensor:
    """One Hugging Face tensor: its name (within its layer, if it belongs to one) and its dimensions as names of ``Dims``."""

    name: str
    dims: tuple[str, ...]

    def shape(self, dims: Dims) -> tuple[int, ...]:
        """Return the shape of the full tensor."""
        return tuple(getattr(dims, name) for name in self.dims)


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter and the Hugging Face tensors that it holds."""

    megatron: tuple[str, ...]  # name in the local layer spec and, where it differs, in Transformer Engine's spec
    kind: Sharding
    hf: tuple[HfTensor, ...]


class Sliceable(Protocol):
    """A tensor, or a tensor in a file; indexing reads a part of it."""

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor: ...


def _block(length: int, tp_rank: int, tp_size: int) -> slice:
    size = length // tp_size
    return slice(tp_rank * size, (tp_rank + 1) * size)


def check_tensor_parallel(tp_size: int, *, heads: int, num_query_groups: int, ffn: int | None) -> None:
    """Raise ValueError when ``tp_size`` ranks cannot divide the sizes of a model; ``ffn`` is None for experts."""
    if tp_size > num_query_groups:
        raise ValueError(
            f"tensor parallelism {tp_size} exceeds num_key_value_heads {num_query_groups}: a key-value head would have "
            f"to be copied to several ranks; use at most {num_query_groups} tensor-parallel ranks"
        )
    sizes = {"num_attention_heads": heads, "num_key_value_heads": num_query_groups, "intermediate_size": ffn}
    for name, size in sizes.items():
        if size is not None and size % tp_size:
            raise ValueError(f"{name} {size} is not a multiple of tensor parallelism {tp_size}; choose a divisor of it")


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is not below the vocabulary's size."""
    return -(-vocab_size // multiple) * multiple


def shard(rule: Rule, dims: Dims, tensors: Sequence[Sliceable], tp_rank: int, tp_size: int) -> Tensor:
    """Build the Megatron parameter of one tensor-parallel rank.

    Args:
        tensors: Whole Hugging Face tensors of the rule, in the rule's order.

    Returns:
        A tensor of the parameter's shape on this rank, in the dtype of the inputs.
    """
    if rule.kind is Sharding.REPLICATED:
        return tensors[0][:]
    if rule.kind is Sharding.ROW:
        return tensors[0][:, _block(rule.hf[0].shape(dims)[1], tp_rank, tp_size)]
    if rule.kind is Sharding.OUTPUT:
        return tensors[0][_block(rule.hf[0].shape(dims)[0], tp_rank, tp_size)]
    if rule.kind is Sharding.VOCAB:
        return _vocab_shard(dims, tensors[0], tp_rank, tp_size)
    parts = [t[_block(hf.shape(dims)[0], tp_rank, tp_size)] for t, hf in zip(tensors, rule.hf)]
    if rule.kind is Sharding.GATE_UP:
        return torch.cat(parts)
    groups = dims.num_query_groups // tp_size
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)


def _vocab_shard(dims: Dims, tensor: Sliceable, tp_rank: int, tp_size: int) -> Tensor:
    rows = _block(dims.padded_vocab, tp_rank, tp_size)
    start, stop = min(rows.start, dims.vocab), min(rows.stop, dims.vocab)
    part = tensor[start:stop]
    padding = part.new_zeros(rows.stop - rows.start - part.shape[0], *part.shape[1:])
    return torch.cat([part, padding]) if padding.shape[0] else part


def merge(rule: Rule, dims: Dims, shards: Sequence[Tensor]) -> list[Tensor]:
    """Rebuild the rule's whole Hugging Face tensors from the shards of all tensor-parallel ranks, in rank order.

    The results may share memory with the shards.
    """
    if rule.kind is Sharding.REPLICATED:
        return [shards[0]]
    if rule.kind is Sharding.ROW:
        return [_cat(shards, dim=1)]
    if rule.kind is Sharding.OUTPUT:
        return [_cat(shards, dim=0)]
    if rule.kind is Sharding.VOCAB:
        return [_cat(shards, dim=0)[: dims.vocab]]
    if rule.kind is Sharding.GATE_UP:
        halves = [part.chunk(2) for part in shards]
        return [_cat([half[i] for half in halves], dim=0) for i in range(2)]
    heads = dims.query // dims.key
    grouped = _cat(shards, dim=0).unflatten(0, (dims.num_query_groups, -1))
    parts = grouped.split([heads * dims.head_dim, dims.head_dim, dims.head_dim], dim=1)
    return [part.flatten(0, 1) for part in parts]


def _cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=dim)


@dataclass(frozen=True)
class PipelineLayout:
    """Assignment of layers to pipeline ranks and model chunks. Layer numbers start at 0.

    With virtual stages chunks alternate over the ranks: chunk c of rank p comes before chunk c of rank p + 1, and all chunks c come before
    all chunks c + 1 (Narayanan et al. 2021, interleaved schedule).
    """

    num_layers: int
    pp_size: int
    vp_size: int = 1  # model chunks per rank

    @property
    def layers_per_chunk(self) -> int:
        return self.num_layers // (self.pp_size * self.vp_size)

    @property
    def last(self) -> tuple[int, int]:
        """Pipeline rank and chunk that hold the end of the model."""
        return self.pp_size - 1, self.vp_size - 1

    def global_layer(self, pp_rank: int, chunk: int, local: int) -> int:
        """Return the number of a layer in the whole model, from its pipeline rank, its chunk and its number there."""
        return (chunk * self.pp_size + pp_rank) * self.layers_per_chunk + local

    def locate(self, layer: int) -> tuple[int, int, int]:
        """Return pipeline rank, chunk and local number of a layer of the whole model."""
        stage, local = divmod(layer, self.layers_per_chunk)
        chunk, pp_rank = divmod(stage, self.pp_size)
        return pp_rank, chunk, local


@dataclass(frozen=True)
class ExpertLayout:
    """Assignment of experts to expert-parallel ranks: contiguous blocks, the same in every layer."""

    num_experts: int  # 0: a dense model
    ep_size: int = 1

    def locate(self, expert: int) -> tuple[int, int]:
        """Return the expert-parallel rank that holds an expert, and the expert's number there."""
        return divmod(expert, self.num_experts // self.ep_size)


@dataclass(frozen=True)
class Entry:
    """One rule applied at one place of the model: a chunk of a pipeline rank, with the full names."""

    rule: Rule
    pp_rank: int
    chunk: int
    megatron_prefix: str = ""
    hf_prefix: str = ""
    #: Expert-parallel rank that holds the whole parameter. None: all hold it, divided as the rule says.
    ep_rank: int | None = None

    def is_on(self, pp_rank: int, ep_rank: int) -> bool:
        """Return whether a rank holds the parameter, or a part of it."""
        return self.pp_rank == pp_rank and self.ep_rank in (None, ep_rank)

    @property
    def megatron_names(self) -> list[str]:
        """Possible names of the parameter in the chunk; each layer spec has exactly one of them."""
        return [self.megatron_prefix + name for name in self.rule.megatron]

    @property
    def hf_names(self) -> list[str]:
        return [self.hf_prefix + tensor.name for tensor in self.rule.hf]


def entries(
    layer_rules: Sequence[Rule],
    expert_rules: Sequence[Rule],
    layout: PipelineLayout,
    experts: ExpertLayout,
    *,
    embedding: Rule,
    final_norm: Rule,
    output: Rule | None,
) -> Iterator[Entry]:
    """Yield every rule of a model at its place, in the order of a Hugging Face state dict. ``output`` is None where it is tied."""
    last_rank, last_chunk = layout.last
    yield Entry(embedding, 0, 0)
    for layer in range(layout.num_layers):
        pp_rank, chunk, local = layout.locate(layer)
        for rule in layer_rules:
            yield Entry(rule, pp_rank, chunk, f"decoder.layers.{local}.", f"model.layers.{layer}.")
        for expert in range(experts.num_experts):
            ep_rank, local_expert = experts.locate(expert)
            megatron_prefix = f"decoder.layers.{local}.mlp.experts.local_experts.{local_expert}."
            hf_prefix = f"model.layers.{layer}.mlp.experts.{expert}."
            for rule in expert_rules:
                yield Entry(rule, pp_rank, chunk, megatron_prefix, hf_prefix, ep_rank)
    yield Entry(final_norm, last_rank, last_chunk)
    if output is not None:
        yield Entry(output, last_rank, last_chunk)

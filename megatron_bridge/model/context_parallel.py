"""Context parallelism: every rank holds two chunks of each sequence and attends to all keys and values before them.

A sequence of s tokens is cut into 2 * cp chunks, and rank r holds chunks r and 2 * cp - 1 - r. Under a causal mask an early chunk has
little to attend to and a late one much, so this gives all ranks the same work (Llama Team 2024, "The Llama 3 Herd of Models", section
3.3.2; the all-gather of keys and values is from there too). Megatron-Core cuts its rotary embedding in the same way.
"""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

import megatron_bridge.platform  # noqa: F401

# isort: split
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_bridge.platform.determinism import deterministic_attention


def own_columns(tensor: Tensor, dim: int, cp_group: dist.ProcessGroup) -> Tensor:
    """Cut out this rank's two chunks, the earlier one first: [..., s, ...] -> [..., s / cp, ...].

    Args:
        dim: Dimension of the columns; their number is a multiple of 2 * cp.
    """
    if cp_group.size() == 1:
        return tensor
    chunks = tensor.chunk(2 * cp_group.size(), dim)
    return torch.cat([chunks[cp_group.rank()], chunks[-1 - cp_group.rank()]], dim)


def whole_columns(tensor: Tensor, dim: int, cp_group: dist.ProcessGroup, *, sum_gradients: bool) -> Tensor:
    """Gather the columns of all ranks, the reverse of ``own_columns``: [..., s / cp, ...] -> [..., s, ...].

    Forward and backward are collective over ``cp_group``.

    Args:
        dim: Dimension of the columns.
        sum_gradients: Whether the backward sums a column's gradients over the ranks, because each rank used the result for
            something different. False: all ranks compute the same from it, and each takes the gradient of its own columns.
    """
    if cp_group.size() == 1:
        return tensor
    gathered = gather_from_sequence_parallel_region(
        tensor.movedim(dim, 0).contiguous(), tensor_parallel_output_grad=sum_gradients, group=cp_group
    )
    parts = gathered.chunk(2 * cp_group.size())  # in rank order, two of each rank
    in_order = [*parts[0::2], *reversed(parts[1::2])]
    return torch.cat(in_order).movedim(0, dim)


class CoreAttention(MegatronModule):
    """Base of the core attentions that Megatron-Core's self-attention builds from the layer spec."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None, "process groups are arguments"
        self.tp_group = pg_collection.tp
        self.cp_group = pg_collection.cp
        self.softmax_scale = softmax_scale


class ContextParallelAttention(CoreAttention):
    """Causal attention of this rank's queries over right-padded sequences.

    Padding lies to the right of real tokens, so these never see it. On a CPU bf16 inputs are attended to in fp32, as without context
    parallelism.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Compute attention, a collective: query [s / cp, b, heads, d], key and value [s / cp, b, groups, d] -> [s / cp, b, heads * d]."""
        assert packed_seq_params is None and attention_bias is None, "packed sequences come with their own layer spec"
        both = whole_columns(torch.cat([key, value], dim=-1), 0, self.cp_group, sum_gradients=True)
        key, value = both.split([key.shape[-1], value.shape[-1]], dim=-1)
        early, late = query.chunk(2)
        cp_rank, num_chunks = self.cp_group.rank(), 2 * self.cp_group.size()
        outputs = []
        for chunk, number in ((early, cp_rank), (late, num_chunks - 1 - cp_rank)):
            visible = (number + 1) * early.shape[0]
            outputs.append(attend(chunk, key[:visible], value[:visible], self.softmax_scale))
        return torch.cat(outputs)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Compute causal attention: query [q, b, heads, d], key and value [k, b, groups, d] -> [q, b, heads * d].

    The queries belong to the last q of the k positions.
    """
    length, b, heads, d = query.shape
    dtype = query.dtype
    q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    if query.device.type == "cpu" and dtype != torch.float32:
        q, k, v = q.float(), k.float(), v.float()
    whole = length == key.shape[0]
    mask = None if whole else causal_lower_right(length, key.shape[0])
    grouped = key.shape[2] != heads
    if grouped and needs_whole_heads(q):
        k, v = (expand_heads(tensor, heads) for tensor in (k, v))
        grouped = False
    kernel = functools.partial(
        F.scaled_dot_product_attention, attn_mask=mask, is_causal=whole, scale=scale, enable_gqa=grouped
    )
    out = deterministic_attention(kernel, q, k, v)
    return out.permute(2, 0, 1, 3).reshape(length, b, heads * d).to(dtype)


def needs_whole_heads(query: Tensor) -> bool:
    """Return whether keys and values must be copied for every query head.

    On CUDA torch has one kernel for float32 that keeps no [b, heads, q, k] scores, the memory-efficient one. It does not take grouped heads
    (``check_batch_size_and_num_heads_dense<false>`` in ATen's ``sdp_utils.cpp``).
    """
    return query.is_cuda and query.dtype == torch.float32


def expand_heads(grouped: Tensor, heads: int) -> Tensor:
    """Copy each group for every query head of it: [b, groups, k, d] -> [b, heads, k, d]."""
    return grouped.repeat_interleave(heads // grouped.shape[1], dim=1)

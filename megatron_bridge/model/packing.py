"""Packed sequences: those of a micro-batch lie one after the other, [1, total] tokens, with no padding between them.

All that works on single tokens (norms, projections, MLPs, the head) computes real tokens alone. Attention does so through
Transformer Engine or, in half precision on a GPU, torch's variable-length attention. Elsewhere sequences of similar length are
attended to together, padded to the longest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import megatron_bridge.platform  # noqa: F401

# isort: split
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_bridge.model.context_parallel import attend
from megatron_bridge.platform.determinism import deterministic_attention

#: A group's shortest sequence has at least this share of its longest one's tokens.
SIMILAR = 0.75


@dataclass(frozen=True)
class Group:
    """Sequences of similar length, as the columns of a padded [s, b] rectangle of tokens."""

    shape: tuple[int, int]  # s, b
    reads: Tensor  # [s * b] int64: the packed token of every place; padding reads the sequence's last one
    tokens: Tensor  # [n] int64: the packed tokens of the group
    places: Tensor  # [n] int64: where they are in the rectangle


@dataclass
class Packing(PackedSeqParams):
    """PackedSeqParams, with what the layers would otherwise ask the device for: every question makes the host wait for it."""

    total: int = 0  # tokens, the fill at the end included
    positions: Tensor = field(
        default_factory=lambda: torch.zeros(0, dtype=torch.int64)
    )  # [total] int64: of every token in its sequence
    groups: tuple[Group, ...] = ()  # for attention that knows rectangles alone
    _angles: tuple[Tensor, Tensor] | None = None  # what ``angles`` was given last, and what it gave

    def angles(self, by_position: Tensor) -> Tensor:
        """Return the rotary angles [total, 1, 1, d] of all tokens, gathered once for all layers.

        Args:
            by_position: [s, 1, 1, d], of the positions from 0 on, as Megatron-Core's rotary embedding gives them.
        """
        if self._angles is None or self._angles[0] is not by_position:
            self._angles = by_position, by_position.index_select(0, self.positions)
        return self._angles[1]


def pack(lengths: Sequence[int], total: int, device: torch.device, grid: int = 1) -> Packing:
    """Where the sequences lie among ``total`` packed tokens; what is left at the end is filled with sequences nobody reads.

    Args:
        lengths: tokens of every sequence, at least 1, in order.
        total: sum of them, or more.
        grid: groups are padded to a multiple of it.
    """
    longest = max(lengths)
    left = total - sum(lengths)
    filler = [longest] * (left // longest) + ([left % longest] if left % longest else [])
    ends = torch.tensor([0, *lengths, *filler], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    on_device = ends.to(device)
    rounded = longest + -longest % grid
    positions = torch.cat([torch.arange(length) for length in (*lengths, *filler)])
    return Packing(
        qkv_format="thd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        max_seqlen_q=rounded,
        max_seqlen_kv=rounded,
        total=total,
        positions=positions.to(device),
        groups=tuple(_group(rows, lengths, ends, grid, device) for rows in _similar(lengths)),
    )


def _similar(lengths: Sequence[int]) -> list[list[int]]:
    """Sequences of similar lengths, longest first."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if not groups or lengths[row] < SIMILAR * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(row)
    return groups


def _group(rows: list[int], lengths: Sequence[int], ends: Tensor, grid: int, device: torch.device) -> Group:
    longest = lengths[rows[0]]
    s = longest + -longest % grid
    own = torch.tensor([lengths[row] for row in rows])
    time = torch.arange(s)[:, None]
    reads = (ends[rows].long() + torch.minimum(time, own - 1)).flatten()
    places = (time < own).flatten().nonzero()[:, 0]
    return Group((s, len(rows)), reads.to(device), reads[places].to(device), places.to(device))


def unpack(packed: Tensor, packing: Packing) -> tuple[Tensor, ...]:
    """[total, ...] -> of every group [s, b, ...]; padding holds what some token holds, and gets no gradient."""
    return _Unpack.apply(packed, packing)


def repack(parts: Sequence[Tensor], packing: Packing) -> Tensor:
    """Of every group [s, b, ...] -> [total, ...]; 0 in the fill at the end."""
    return _Repack.apply(packing, *parts)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, packing: Packing) -> tuple[Tensor, ...]:
        ctx.packing, ctx.shape = packing, packed.shape
        return tuple(packed.index_select(0, g.reads).view(*g.shape, *packed.shape[1:]) for g in packing.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _to_packed(grads, ctx.packing), None


class _Repack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packing: Packing, *parts: Tensor) -> Tensor:
        ctx.packing = packing
        return _to_packed(parts, packing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts = []
        for group in ctx.packing.groups:
            s, b = group.shape
            flat = grad.new_zeros(s * b, *grad.shape[1:])
            flat.index_copy_(0, group.places, grad.index_select(0, group.tokens))
            parts.append(flat.view(s, b, *grad.shape[1:]))
        return None, *parts


def _to_packed(parts: Sequence[Tensor], packing: Packing) -> Tensor:
    shape = parts[0].shape[2:]
    packed = parts[0].new_zeros(packing.total, *shape)
    for part, group in zip(parts, packing.groups):
        packed.index_copy_(0, group.tokens, part.reshape(-1, *shape).index_select(0, group.places))
    return packed


def attend_packed(query: Tensor, key: Tensor, value: Tensor, scale: float | None, packing: Packing) -> Tensor:
    """Causal attention within every sequence: query [total, heads, d], key and value [total, groups, d] -> [total, heads * d]."""
    if query.is_cuda and query.dtype != torch.float32:
        from torch.nn.attention.varlen import varlen_attn

        ends, longest = packing.cu_seqlens_q, packing.max_seqlen_q
        grouped = key.shape[1] != query.shape[1]
        causal = (-1, 0)

        def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out = varlen_attn(
                query, key, value, ends, ends, longest, longest, scale=scale, window_size=causal, enable_gqa=grouped
            )
            assert isinstance(out, Tensor)  # a pair only where log-sum-exps are asked for
            return out

        return deterministic_attention(kernel, query, key, value).flatten(1)
    return by_group(lambda q, k, v: attend(q, k, v, scale), (query, key, value), packing)


def by_group(function: Callable[..., Tensor], inputs: Sequence[Tensor], packing: Packing) -> Tensor:
    """``function`` of each group's [s, b, ...] tensors, giving [s, b, ...], put together again to [total, ...].

    Args:
        inputs: [total, ...] each.
    """
    groups = zip(*(unpack(tensor, packing) for tensor in inputs))
    return repack([function(*tensors) for tensors in groups], packing)

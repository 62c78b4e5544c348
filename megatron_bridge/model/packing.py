"""Packed sequences: the sequences of a micro-batch lie one after the other, [1, total] tokens, with no padding between them.

So everything that works on single tokens (norms, projections, MLPs, the head) computes real tokens only. Attention uses Transformer
Engine or, in half precision on a GPU, torch's variable-length attention. Elsewhere it processes sequences of similar length together,
padded to the longest of them.
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

#: The shortest sequence of a group has at least this share of the longest one's tokens.
SIMILAR = 0.75


@dataclass(frozen=True)
class SequenceGroup:
    """Sequences of similar length, as the columns of a padded [s, b] rectangle of tokens."""

    shape: tuple[int, int]  # s, b
    reads: Tensor  # [s * b] int64: packed token of every place; padding reads the sequence's last one
    tokens: Tensor  # [n] int64: packed tokens of the group
    places: Tensor  # [n] int64: places of these tokens in the rectangle


@dataclass
class Packing(PackedSeqParams):
    """PackedSeqParams with precomputed positions and groups. Layers that asked the device for them would make the host wait."""

    total: int = 0  # tokens, the filler at the end included
    #: [total] int64: position of every token in its sequence.
    positions: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    groups: tuple[SequenceGroup, ...] = ()  # groups for attention that only works on rectangles
    _angles: tuple[Tensor, Tensor] | None = None  # last input and output of ``angles``

    def angles(self, by_position: Tensor) -> Tensor:
        """Return the rotary angles [total, 1, 1, d] of all tokens, gathered once for all layers.

        Args:
            by_position: Angles [s, 1, 1, d] of the positions from 0 on, as Megatron-Core's rotary embedding gives them.
        """
        if self._angles is None or self._angles[0] is not by_position:
            self._angles = by_position, by_position.index_select(0, self.positions)
        return self._angles[1]


def pack(lengths: Sequence[int], total: int, device: torch.device, grid: int = 1) -> Packing:
    """Lay out sequences among ``total`` packed tokens. The rest at the end is filled with sequences that nobody reads.

    Args:
        lengths: Tokens of every sequence, at least 1, in order.
        total: Number of packed tokens, at least the sum of the lengths.
        device: Device of the result's tensors.
        grid: Multiple that groups are padded to.
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
    """Return groups of sequences of similar lengths, the longest first."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if not groups or lengths[row] < SIMILAR * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(row)
    return groups


def _group(rows: list[int], lengths: Sequence[int], ends: Tensor, grid: int, device: torch.device) -> SequenceGroup:
    longest = lengths[rows[0]]
    s = longest + -longest % grid
    own = torch.tensor([lengths[row] for row in rows])
    time = torch.arange(s)[:, None]
    reads = (ends[rows].long() + torch.minimum(time, own - 1)).flatten()
    places = (time < own).flatten().nonzero()[:, 0]
    return SequenceGroup((s, len(rows)), reads.to(device), reads[places].to(device), places.to(device))


def unpack(packed: Tensor, packing: Packing) -> tuple[Tensor, ...]:
    """Split packed tokens into the groups' rectangles: [total, ...] -> [s, b, ...] for every group.

    Padding repeats the values of some token, and gets no gradient.
    """
    return _Unpack.apply(packed, packing)


def repack(parts: Sequence[Tensor], packing: Packing) -> Tensor:
    """Join the groups' rectangles [s, b, ...] to packed tokens [total, ...]; the filler at the end is 0."""
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
    """Compute causal attention within every sequence: query [total, heads, d], key and value [total, groups, d] -> [total, heads * d]."""
    if query.is_cuda and query.dtype != torch.float32:
        from torch.nn.attention.varlen import varlen_attn

        ends, longest = packing.cu_seqlens_q, packing.max_seqlen_q
        grouped = key.shape[1] != query.shape[1]
        causal = (-1, 0)

        def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out = varlen_attn(
                query, key, value, ends, ends, longest, longest, scale=scale, window_size=causal, enable_gqa=grouped
            )
            assert isinstance(out, Tensor)  # it is a pair only if log-sum-exps are asked for
            return out

        return deterministic_attention(kernel, query, key, value).flatten(1)
    return by_group(lambda q, k, v: attend(q, k, v, scale), (query, key, value), packing)


def by_group(function: Callable[..., Tensor], inputs: Sequence[Tensor], packing: Packing) -> Tensor:
    """Apply a function to every group's rectangles and join the results to [total, ...].

    Args:
        function: Function of tensors [s, b, ...] that gives [s, b, ...].
        inputs: Packed tensors, [total, ...] each.
        packing: Layout of the packed sequences.
    """
    groups = zip(*(unpack(tensor, packing) for tensor in inputs))
    return repack([function(*tensors) for tensors in groups], packing)

"""Self-attention that computes rotary embedding, scores and weighted sums in one function of the projected heads."""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
from torch import Tensor

import megatron_bridge.platform  # noqa: F401

# isort: split
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config

from megatron_bridge.model.cached_attention import CachedSelfAttention
from megatron_bridge.model.packing import Packing, by_group


class AttentionKernel(Protocol):
    """Rotary embedding (Su et al. 2021) of queries and keys, then causal attention from the first token of every sequence on.

    The query heads of a group lie next to the group's key and value, which are never expanded.
    """

    def __call__(self, mixed: Tensor, cos: Tensor, sin: Tensor, softmax_scale: float) -> Tensor:
        """Compute attention from the projected heads.

        Args:
            mixed: Projected heads [s, b, g, r + 2, d]: each of the g groups has r query heads, then the key, then the value.
            cos: Cosines [s, d] float32, the halves of d equal ("rotate half"), times the attention scaling of YaRN.
            sin: Sines [s, d] float32, in the same form.
            softmax_scale: Factor on the scores.

        Returns:
            [s, b, g * r * d] in the dtype of ``mixed``.
        """


@functools.lru_cache(maxsize=8)
def rotation(angles: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine [s, d] of angles [s, 1, 1, d]. The result is cached, since Megatron-Core keeps one tensor per length."""
    angles = angles[:, 0, 0].float()
    return angles.cos() * scaling, angles.sin() * scaling


class FusedSelfAttention(CachedSelfAttention):
    """Self-attention through ``kernel`` where ``is_fused`` is true. Otherwise, and with a cache of keys and values, it is Megatron-Core's."""

    kernel: AttentionKernel

    def is_fused(self, hidden_states: Tensor, angles: Tensor) -> bool:
        """Return whether inputs [s, b, hidden] with angles [s, 1, 1, d] go through the kernel: here all do."""
        return True

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention, [s, b, hidden] -> ([s, b, hidden], no bias).

        Under sequence parallelism the input is a slice of s. With packed sequences b is 1.
        """
        assert rotary_pos_emb is not None, "the supported families have rotary embeddings"
        cached = kwargs.get("inference_context") is not None
        if cached or not self.is_fused(hidden_states, rotary_pos_emb):
            return super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)
        groups, d = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        if self.config.qk_layernorm:
            query, key, value = self.get_query_key_value_tensors(hidden_states, None)
            query = query.unflatten(2, (groups, -1))
            mixed = torch.cat((query, key.unsqueeze(3), value.unsqueeze(3)), dim=3)
        else:
            mixed = self.get_query_key_value_tensors(hidden_states, None, split_qkv=False)[0].unflatten(3, (-1, d))
        cos, sin = rotation(rotary_pos_emb, _yarn_get_concentration_factor_from_config(self.config))
        scale = self.config.softmax_scale or d**-0.5

        def attention(part: Tensor) -> Tensor:
            return self.kernel(part, cos[: len(part)], sin[: len(part)], scale)

        packing: Packing | None = kwargs.get("packed_seq_params")
        if packing is None:
            return self.linear_proj(attention(mixed))
        return self.linear_proj(by_group(attention, [mixed.squeeze(1)], packing).unsqueeze(1))

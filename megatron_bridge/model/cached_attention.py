"""Self-attention with a cache of keys and values, for decoding, and with packed sequences.

Megatron-Core rotates packed queries and keys sequence by sequence. For that every layer asks the device for the lengths, and the host
waits. Here the angles of all tokens are gathered by position, once for all layers.

Megatron-Core's own inference contexts do not fit. With the static one all rows of a batch are at one position, so no request can join
a running batch. The dynamic one needs flash-attention, and so CUDA. ``SlotCache`` follows the dynamic one's protocol with ``GPTModel`` (all
tokens of a forward in one row, logits of only some of them) and attends with torch on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_bridge import platform
from megatron_bridge.model.context_parallel import attend
from megatron_bridge.model.packing import Packing


@dataclass(frozen=True)
class Stretch:
    """Consecutive tokens of one sequence that a forward processes."""

    slot: int
    start: int  # position of the first of them
    length: int


class SlotCache(BaseInferenceContext):
    """Keys and values of up to ``num_slots`` sequences, and the sequences that the tokens of the current forward belong to.

    The tokens of a forward lie in one row: first one token of each of the slots 0 .. n - 1 (sequences in decoding), then whole stretches
    of other slots, then padding.
    """

    def __init__(self, config: TransformerConfig, num_slots: int, max_length: int) -> None:
        """Allocate the cache on this rank's device.

        Args:
            config: Configuration of a model without pipeline stages.
            num_slots: Most sequences.
            max_length: Most tokens of a sequence.
        """
        super().__init__(materialize_only_last_token_logits=True)
        self.config = config
        self.max_sequence_length = max_length
        device = platform.device()
        shape = cache_shape(config, num_slots, max_length)
        # Zeros, not uninitialised memory: what lies behind a sequence's end is masked, but a NaN would survive the mask.
        self.keys = torch.zeros(shape, dtype=cache_dtype(config.params_dtype, device.type), device=device)
        self.values = torch.zeros_like(self.keys)

    def is_static_batching(self) -> bool:
        """Return False: the positions within a forward differ."""
        return False

    def is_decode_only(self) -> bool:
        """Return True when every token of the forward is the next one of a sequence."""
        return not self._stretches

    def take(
        self, positions: Sequence[int], stretches: Sequence[Stretch], num_tokens: int, rows: Sequence[int]
    ) -> None:
        """Set the tokens of the next forward.

        Args:
            positions: Positions [n] of the tokens of slots 0 .. n - 1.
            stretches: Stretches that follow these tokens.
            num_tokens: Number of tokens of the forward, padding included.
            rows: Places in the forward of the tokens whose logits are needed.
        """
        slots = [*range(len(positions)), *(s.slot for s in stretches for _ in range(s.length))]
        places = [*positions, *(s.start + i for s in stretches for i in range(s.length))]
        device = self.keys.device
        self._slots = torch.tensor(slots, device=device)
        self._positions = torch.tensor(places, device=device)
        self._num_decoded = len(positions)
        self._stretches = list(stretches)
        self._rows = torch.tensor(rows, device=device)
        self._longest = max(positions, default=-1) + 1
        self._visible = (
            torch.arange(self._longest, device=device) <= self._positions[: len(positions), None, None, None]
        )
        #: [num_tokens] int64, the padding at position 0.
        self.positions = F.pad(self._positions, (0, num_tokens - len(places)))

    def last_token_logits(self, hidden_states: Tensor) -> Tensor:
        """Choose the tokens whose logits are needed, [1, t, hidden] -> [rows, hidden]. GPTModel calls this before its output layer."""
        return hidden_states[0, self._rows]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of one slot to another."""
        for cache in (self.keys, self.values):
            cache[:, target, :, :length] = cache[:, source, :, :length]

    def attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store keys and values, then attend to the earlier tokens of the same sequences.

        Args:
            layer_number: Number of the layer, from 1.
            query: [t, 1, heads, d], rotated.
            key: [t, 1, groups, d], rotated.
            value: [t, 1, groups, d].

        Returns:
            [t, 1, heads * d], zeros for padding.
        """
        num_real, num_decoded = len(self._slots), self._num_decoded
        keys, values = self.keys[layer_number - 1], self.values[layer_number - 1]
        keys[self._slots, :, self._positions] = key[:num_real, 0]
        values[self._slots, :, self._positions] = value[:num_real, 0]
        result = query.new_zeros(query.shape[0], 1, query.shape[2] * query.shape[3])
        if num_decoded:
            result[:num_decoded, 0] = self._decode(query[:num_decoded, 0], keys, values)
        first = num_decoded
        for stretch in self._stretches:
            end = stretch.start + stretch.length
            past = [cache[stretch.slot, :, :end].transpose(0, 1).unsqueeze(1) for cache in (keys, values)]
            own = slice(first, first + stretch.length)
            result[own] = attend(query[own], past[0], past[1], self.config.softmax_scale)
            first += stretch.length
        return result

    def _decode(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Compute the attention of one token of each sequence, [n, heads, d] -> [n, heads * d]. One product covers the query heads of a group."""
        num, heads, d = query.shape
        grouped = query.view(num, keys.shape[1], -1, d)
        past = [cache[:num, :, : self._longest] for cache in (keys, values)]
        scale = self.config.softmax_scale
        out = F.scaled_dot_product_attention(grouped, past[0], past[1], attn_mask=self._visible, scale=scale)
        return out.reshape(num, heads * d)


def cache_shape(config: TransformerConfig, num_slots: int, max_length: int) -> tuple[int, ...]:
    """Return the shape of the cache of keys, which the cache of values shares: [layers, slots, groups of this rank, length, d]."""
    groups = max(1, config.num_query_groups // config.tensor_model_parallel_size)
    return config.num_layers, num_slots, groups, max_length, config.kv_channels


def cache_dtype(params_dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Return the dtype of the cache. On a CPU attention is computed in float32, so a float32 cache needs no conversion for every token."""
    return torch.float32 if device_type == "cpu" else params_dtype


class CachedSelfAttention(SelfAttention):
    """Megatron-Core's self-attention, except that it uses a ``SlotCache`` if a forward brings one, and rotates packed tokens itself."""

    _packed_angles: Tensor | None = None  # [t, 1, 1, d] during a packed forward

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        inference_context: BaseInferenceContext | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention, [s, b, hidden] -> ([s, b, hidden], no bias).

        Under sequence parallelism the input is a slice of s. With packed sequences or a cache, b is 1.
        """
        assert rotary_pos_emb is not None, "the supported families have rotary embeddings"
        if inference_context is None and packed_seq_params is None:
            return super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)
        if inference_context is None:
            assert isinstance(packed_seq_params, Packing), "packed sequences are made by packing.pack"
            self._packed_angles = packed_seq_params.angles(rotary_pos_emb)
            try:
                return super().forward(
                    hidden_states, attention_mask, *args, packed_seq_params=packed_seq_params, **kwargs
                )
            finally:
                self._packed_angles = None
        assert isinstance(inference_context, SlotCache)
        dtype = hidden_states.dtype
        projected = self.get_query_key_value_tensors(hidden_states, None)
        query, key, value = (tensor.to(inference_context.keys.dtype) for tensor in projected)
        angles = rotary_pos_emb[inference_context.positions]
        query, key = self._rotate(query, angles), self._rotate(key, angles)
        return self.linear_proj(inference_context.attend(self.layer_number, query, key, value).to(dtype))

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Return Megatron-Core's query, key and value; in a packed forward queries and keys are already rotated."""
        projected = super().get_query_key_value_tensors(*args, **kwargs)
        if self._packed_angles is None:
            return projected
        query, key, value = projected
        return self._rotate(query, self._packed_angles), self._rotate(key, self._packed_angles), value

    def _rotate(self, heads: Tensor, angles: Tensor) -> Tensor:
        """Rotate [t, 1, heads, d] by the angles [t, 1, 1, d] of every token."""
        mscale = _yarn_get_concentration_factor_from_config(self.config)
        return apply_rotary_pos_emb(heads, angles, self.config, mscale=mscale, cp_group=self.pg_collection.cp)

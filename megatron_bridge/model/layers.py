"""Layers of the local spec that Megatron-Core has no portable version of, and the choice of the layer spec.

In half precision, Transformer Engine's spec is used if it is installed. Otherwise the local spec is used, with these replacements:
attention through torch's ``scaled_dot_product_attention`` instead of an explicit (batch, heads, s, s) score tensor; an RMSNorm whose
weight is marked for sequence parallelism (Megatron-Core's torch wrapper refuses it); and the functions of ``kernels`` for RMSNorm,
SwiGLU and, on a CPU, attention to short sequences.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_bridge import platform
from megatron_bridge.model.cached_attention import CachedSelfAttention
from megatron_bridge.model.context_parallel import ContextParallelAttention, CoreAttention, attend
from megatron_bridge.model.fused_attention import FusedSelfAttention
from megatron_bridge.model.kernels import rms_norm, rotary_causal_attention, swiglu
from megatron_bridge.model.packing import Packing, attend_packed

#: True when Megatron-Core could import Transformer Engine and there is a device for it.
HAS_TRANSFORMER_ENGINE: bool = platform.HAS_CUDA and HAVE_TE


def uses_transformer_engine(dtype: torch.dtype) -> bool:
    """Return whether a model with parameters of ``dtype`` is built from Transformer Engine's layers.

    Not in float32: its attention would keep [b, heads, s, s] scores and has no kernel for packed sequences, while torch has one that keeps
    no scores.
    """
    return HAS_TRANSFORMER_ENGINE and dtype != torch.float32


class SdpaCoreAttention(CoreAttention):
    """Causal attention over right-padded sequences. It needs no mask: padding lies to the right of real tokens, so these never see it.

    On a CPU bf16 inputs are attended to in fp32: torch's bf16 CPU kernel is several times slower at the short lengths of CPU runs, and fp32
    is the more exact of the two.
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
        """Compute attention: query [s, b, heads, d], key and value [s, b, groups, d] -> [s, b, heads * d]. Packed tensors have no b."""
        assert attention_bias is None, "causal attention takes no bias"
        if packed_seq_params is not None:
            assert isinstance(packed_seq_params, Packing), "packed sequences are made by packing.pack"
            return attend_packed(query, key, value, self.softmax_scale, packed_seq_params)
        return attend(query, key, value, self.softmax_scale)


class ShortSequenceSelfAttention(FusedSelfAttention):
    """Self-attention that keeps the scores of short sequences in bf16 on a CPU, where this is faster than kernels that never keep them.

    In float32 it uses the core attention, which rounds as transformers does: float32 models are compared with transformers.
    """

    #: Longer sequences use the core attention. Scores take s * s * 4 bytes for each sequence, head and layer.
    MAX_SEQUENCE = 256

    kernel = staticmethod(rotary_causal_attention)

    def is_fused(self, hidden_states: Tensor, angles: Tensor) -> bool:
        """Return whether the inputs are short, bf16, and on a CPU."""
        bf16_on_cpu = hidden_states.device.type == "cpu" and hidden_states.dtype == torch.bfloat16
        return bf16_on_cpu and angles.shape[0] <= self.MAX_SEQUENCE


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm, computed in fp32."""

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        persist_layer_norm: bool = False,
        zero_centered_gamma: bool = False,
        normalization: str = "RMSNorm",
    ) -> None:
        super().__init__()
        self.eps = eps
        self.normalized_shape = (hidden_size,)
        device = torch.device("cpu") if config.use_cpu_initialization else platform.device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        # Megatron-Core sums the gradients of such weights over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron-Core's attribute

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise [..., hidden] -> [..., hidden]."""
        if hidden_states.dtype == torch.float32:
            return F.rms_norm(hidden_states, self.normalized_shape, self.weight, self.eps)
        return rms_norm(hidden_states, self.weight, self.eps)


class SwiGlu(MegatronModule):
    """Activation of the MLP, [..., 2 f] -> [..., f]."""

    def forward(self, gate_and_up: Tensor) -> Tensor:
        return swiglu(gate_and_up)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return an empty state dict: there is nothing to store, and Megatron-Core's own method asks the global process groups."""
        return {}


def decoder_spec(config: TransformerConfig, num_local_layers: int) -> TransformerBlockSubmodules:
    """Return the layer spec of one model chunk."""
    if uses_transformer_engine(config.params_dtype):
        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm
        )
        layer.submodules.self_attention.module = CachedSelfAttention
        from megatron.core.extensions.transformer_engine import TENorm

        return TransformerBlockSubmodules(layer_specs=[layer] * num_local_layers, layer_norm=TENorm)
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    submodules = layer.submodules
    submodules.input_layernorm = RMSNorm
    submodules.pre_mlp_layernorm = RMSNorm
    if config.num_moe_experts is None:
        submodules.mlp.submodules.activation_func = SwiGlu
        config.use_te_activation_func = True  # Megatron-Core then calls the spec's activation
    attention: ModuleSpec = submodules.self_attention
    if config.context_parallel_size == 1:
        attention.module = ShortSequenceSelfAttention
        attention.submodules.core_attention = SdpaCoreAttention
    else:
        attention.submodules.core_attention = ContextParallelAttention
    if config.qk_layernorm:
        attention.submodules.q_layernorm = RMSNorm
        attention.submodules.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_local_layers, layer_norm=RMSNorm)

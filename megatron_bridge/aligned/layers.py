"""Megatron-Core's layers with aligned forwards: the modules of the aligned layer spec.

A column-parallel layer differs from Megatron-Core's only in its matrix product. An aligned row-parallel layer divides its weight by
outputs instead of inputs: each rank gathers the whole input, computes complete sums for its part of the outputs, and the ranks then
exchange the outputs. So no sum runs over ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import megatron_bridge.platform  # noqa: F401

# isort: split
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    all_gather_last_dim_from_tensor_parallel_region,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.mappings import all_to_all_hp2sp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_bridge.aligned.attention import rotary_causal_attention
from megatron_bridge.aligned.products import product
from megatron_bridge.aligned.rows import rms_norm, swiglu
from megatron_bridge.model.fused_attention import FusedSelfAttention
from megatron_bridge.model.layers import RMSNorm, SdpaCoreAttention, SwiGlu


class AlignedColumnParallelLinear(ColumnParallelLinear):
    """Linear layer whose outputs are divided over the tensor-parallel ranks."""

    def _forward_impl(
        self, input: Tensor, weight: Tensor, *, bias: Tensor | None, allreduce_dgrad: bool, **_: Any
    ) -> Tensor:
        """Compute the layer's product. ``ColumnParallelLinear.forward`` calls this instead of Megatron-Core's, with the same arguments."""
        if self.sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=self.tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=self.tp_group)
        output = product(input, weight)
        return output if bias is None else output + bias


class AlignedRowParallelLinear(ColumnParallelLinear):
    """Linear layer whose inputs are divided over the tensor-parallel ranks.

    Its outputs are whole, or divided by tokens under sequence parallelism. ``weight`` is [outputs / tp, inputs].
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], Any],
        bias: bool,
        input_is_parallel: bool,
        skip_bias_add: bool,
        **kwargs: Any,
    ) -> None:
        assert input_is_parallel and not bias, "the supported families have neither"
        super().__init__(
            input_size,
            output_size,
            config=config,
            init_method=init_method,
            bias=False,
            skip_bias_add=skip_bias_add,
            **kwargs,
        )

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        """Compute [s, b, inputs / tp] -> ([s, b, outputs], no bias); under sequence parallelism the output is [s / tp, b, outputs]."""
        output = product(all_gather_last_dim_from_tensor_parallel_region(input_, group=self.tp_group), self.weight)
        if not self.sequence_parallel:
            return gather_from_tensor_model_parallel_region(output, group=self.tp_group), None
        s, b, _ = input_.shape
        return all_to_all_hp2sp(output, group=self.tp_group).view(s // self.tp_group.size(), b, -1), None


class AlignedSelfAttention(FusedSelfAttention):
    """Self-attention in tiles of queries. The core attention of the layer spec is not called.

    With a key-value cache attention takes one token at a time, so it has no tiles and is not aligned.
    """

    kernel = staticmethod(rotary_causal_attention)


class AlignedRMSNorm(RMSNorm):
    """Root-mean-square norm, computed in fp32."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise [..., hidden] -> [..., hidden]."""
        return rms_norm(hidden_states, self.weight, self.eps)


class AlignedSwiGlu(SwiGlu):
    """Activation of the MLP, [..., 2 f] -> [..., f]."""

    def forward(self, gate_and_up: Tensor) -> Tensor:
        return swiglu(gate_and_up)


def aligned_decoder_spec(config: TransformerConfig, num_local_layers: int) -> TransformerBlockSubmodules:
    """Return the layer spec of one model chunk."""
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    submodules = layer.submodules
    submodules.input_layernorm = AlignedRMSNorm
    submodules.pre_mlp_layernorm = AlignedRMSNorm
    mlp = submodules.mlp.submodules
    mlp.linear_fc1 = AlignedColumnParallelLinear
    mlp.linear_fc2 = AlignedRowParallelLinear
    mlp.activation_func = AlignedSwiGlu
    config.use_te_activation_func = True  # Megatron-Core then calls the spec's activation
    attention: ModuleSpec = submodules.self_attention
    attention.module = AlignedSelfAttention
    attention.submodules.linear_qkv = AlignedColumnParallelLinear
    attention.submodules.core_attention = SdpaCoreAttention
    attention.submodules.linear_proj = AlignedRowParallelLinear
    if config.qk_layernorm:
        attention.submodules.q_layernorm = AlignedRMSNorm
        attention.submodules.k_layernorm = AlignedRMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_local_layers, layer_norm=AlignedRMSNorm)


def aligned_output_layer(config: TransformerConfig, model: GPTModel) -> AlignedColumnParallelLinear:
    """Build the aligned output layer of a language model, with the same parameters as the layer that it replaces."""
    return AlignedColumnParallelLinear(
        config.hidden_size,
        model.vocab_size,
        config=config,
        init_method=config.init_method,
        bias=False,
        gather_output=False,
        skip_weight_param_allocation=model.pre_process and model.share_embeddings_and_output_weights,
        tp_group=model.pg_collection.tp,
    )

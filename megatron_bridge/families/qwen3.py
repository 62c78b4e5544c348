"""Qwen3 dense: an RMSNorm on every query and key head, and a head size of its own."""

from __future__ import annotations

from megatron_bridge.families import decoder

FAMILY = decoder.Family(
    model_type="qwen3",
    causal_lm="Qwen3ForCausalLM",
    sequence_classifier="Qwen3ForSequenceClassification",
    layer_rules=(
        decoder.QKV_WEIGHT,
        decoder.ATTENTION_OUTPUT,
        decoder.Q_NORM,
        decoder.K_NORM,
        *decoder.MLP_AND_NORMS,
    ),
    qk_layernorm=True,
    defaults={**decoder.COMMON_DEFAULTS, "max_position_embeddings": 32768, "head_dim": 128},
    required_values=decoder.COMMON_REQUIRED_VALUES,
)

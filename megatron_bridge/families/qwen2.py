"""Qwen2 and Qwen2.5 dense: query, key and value projections have a bias."""

from __future__ import annotations

from megatron_bridge.families import decoder

FAMILY = decoder.Family(
    model_type="qwen2",
    causal_lm="Qwen2ForCausalLM",
    sequence_classifier="Qwen2ForSequenceClassification",
    layer_rules=(decoder.QKV_WEIGHT, decoder.QKV_BIAS, decoder.ATTENTION_OUTPUT, *decoder.MLP_AND_NORMS),
    qkv_bias=True,
    defaults={**decoder.COMMON_DEFAULTS, "max_position_embeddings": 32768},
    required_values={name: value for name, value in decoder.COMMON_REQUIRED_VALUES.items() if name != "attention_bias"},
)

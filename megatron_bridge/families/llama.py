"""Llama 1, 2 and 3, and the many checkpoints that use its architecture."""

from __future__ import annotations

from megatron_bridge.families import decoder

FAMILY = decoder.Family(
    model_type="llama",
    causal_lm="LlamaForCausalLM",
    sequence_classifier="LlamaForSequenceClassification",
    layer_rules=(decoder.QKV_WEIGHT, decoder.ATTENTION_OUTPUT, *decoder.MLP_AND_NORMS),
    defaults={**decoder.COMMON_DEFAULTS, "max_position_embeddings": 2048},
    required_values=decoder.COMMON_REQUIRED_VALUES,
)

"""Qwen3 mixture of experts: Qwen3's attention, and a router with experts in every layer."""

from __future__ import annotations

from megatron_bridge.families import decoder

FAMILY = decoder.Family(
    model_type="qwen3_moe",
    causal_lm="Qwen3MoeForCausalLM",
    sequence_classifier="Qwen3MoeForSequenceClassification",
    layer_rules=(
        decoder.QKV_WEIGHT,
        decoder.ATTENTION_OUTPUT,
        decoder.Q_NORM,
        decoder.K_NORM,
        decoder.ROUTER,
        *decoder.NORMS,
    ),
    expert_rules=decoder.EXPERT,
    qk_layernorm=True,
    defaults={
        **decoder.COMMON_DEFAULTS,
        "max_position_embeddings": 32768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "output_router_logits": False,
    },
    # Layers without experts would need their own layer spec. Router logits stay off because transformers adds its load-balancing loss only
    # with them; Megatron-Core's depends on how a minibatch is cut into micro-batches.
    required_values={
        **decoder.COMMON_REQUIRED_VALUES,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "output_router_logits": False,
    },
)

"""The tables that the decoder families share, and the record of a family."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_bridge.families.param_mapping import HfTensor, Kind, Rule


@dataclass(frozen=True)
class Family:
    """What the bridge knows of one Hugging Face ``model_type``."""

    model_type: str
    causal_lm: str  # Hugging Face architecture of a language model
    sequence_classifier: str  # Hugging Face architecture of a model with a value or score head
    layer_rules: tuple[Rule, ...]  # of one decoder layer, in the order of the Hugging Face state dict
    expert_rules: tuple[Rule, ...] = ()  # of one expert; empty for a dense model
    qkv_bias: bool = False
    qk_layernorm: bool = False
    defaults: dict[str, Any] = field(default_factory=dict)  # values of fields that a config.json may leave out
    required_values: dict[str, Any] = field(default_factory=dict)  # the one value that is supported, for each field

    def architecture(self, head: str) -> str:
        """Hugging Face architecture of a model with this head."""
        return self.causal_lm if head == "lm" else self.sequence_classifier


#: Fields that every family has, with transformers' defaults.
COMMON_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
}

#: Megatron-Core has one switch for the biases of all linear layers, and dropout would part the trainer's log-probs from
#: the rollout engine's.
COMMON_REQUIRED_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
}

EMBEDDING = Rule(
    ("embedding.word_embeddings.weight",), Kind.VOCAB, (HfTensor("model.embed_tokens.weight", ("vocab", "hidden")),)
)
FINAL_NORM = Rule(("decoder.final_layernorm.weight",), Kind.REPLICATED, (HfTensor("model.norm.weight", ("hidden",)),))
LM_HEAD = Rule(("output_layer.weight",), Kind.VOCAB, (HfTensor("lm_head.weight", ("vocab", "hidden")),))
SCORE_HEAD = Rule(("output_layer.weight",), Kind.REPLICATED, (HfTensor("score.weight", ("labels", "hidden")),))
#: The last pipeline stage's own copy of tied embeddings.
TIED_LM_HEAD = Rule(("output_layer.weight",), Kind.VOCAB, EMBEDDING.hf)

QKV_WEIGHT = Rule(
    ("self_attention.linear_qkv.weight",),
    Kind.QKV,
    (
        HfTensor("self_attn.q_proj.weight", ("query", "hidden")),
        HfTensor("self_attn.k_proj.weight", ("key", "hidden")),
        HfTensor("self_attn.v_proj.weight", ("key", "hidden")),
    ),
)
QKV_BIAS = Rule(
    ("self_attention.linear_qkv.bias",),
    Kind.QKV,
    (
        HfTensor("self_attn.q_proj.bias", ("query",)),
        HfTensor("self_attn.k_proj.bias", ("key",)),
        HfTensor("self_attn.v_proj.bias", ("key",)),
    ),
)
Q_NORM = Rule(
    ("self_attention.q_layernorm.weight",), Kind.REPLICATED, (HfTensor("self_attn.q_norm.weight", ("head_dim",)),)
)
K_NORM = Rule(
    ("self_attention.k_layernorm.weight",), Kind.REPLICATED, (HfTensor("self_attn.k_norm.weight", ("head_dim",)),)
)
ATTENTION_OUTPUT = Rule(
    ("self_attention.linear_proj.weight",), Kind.ROW, (HfTensor("self_attn.o_proj.weight", ("hidden", "query")),)
)
NORMS = (
    Rule(
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        Kind.REPLICATED,
        (HfTensor("input_layernorm.weight", ("hidden",)),),
    ),
    Rule(
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        Kind.REPLICATED,
        (HfTensor("post_attention_layernorm.weight", ("hidden",)),),
    ),
)
MLP_AND_NORMS = (
    Rule(
        ("mlp.linear_fc1.weight",),
        Kind.GATE_UP,
        (HfTensor("mlp.gate_proj.weight", ("ffn", "hidden")), HfTensor("mlp.up_proj.weight", ("ffn", "hidden"))),
    ),
    Rule(("mlp.linear_fc2.weight",), Kind.ROW, (HfTensor("mlp.down_proj.weight", ("hidden", "ffn")),)),
    *NORMS,
)
ROUTER = Rule(("mlp.router.weight",), Kind.REPLICATED, (HfTensor("mlp.gate.weight", ("num_experts", "hidden")),))
#: Names within an expert. No expert is divided: expert parallelism takes the place of tensor parallelism in expert layers.
EXPERT = (
    Rule(
        ("linear_fc1.weight",),
        Kind.GATE_UP,
        (HfTensor("gate_proj.weight", ("ffn", "hidden")), HfTensor("up_proj.weight", ("ffn", "hidden"))),
    ),
    Rule(("linear_fc2.weight",), Kind.ROW, (HfTensor("down_proj.weight", ("hidden", "ffn")),)),
)

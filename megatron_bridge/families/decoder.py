"""Tables that the decoder families share, and the record of a family."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_bridge.families.param_mapping import HfTensor, Sharding, Rule


@dataclass(frozen=True)
class Family:
    """Names, rules and options of one Hugging Face ``model_type``."""

    model_type: str
    causal_lm: str  # Hugging Face architecture of a language model
    sequence_classifier: str  # Hugging Face architecture of a model with a value or score head
    layer_rules: tuple[Rule, ...]  # rules of one decoder layer, in the order of the Hugging Face state dict
    expert_rules: tuple[Rule, ...] = ()  # rules of one expert; empty for a dense model
    qkv_bias: bool = False
    qk_layernorm: bool = False
    defaults: dict[str, Any] = field(default_factory=dict)  # field -> value where a config.json leaves it out
    required_values: dict[str, Any] = field(default_factory=dict)  # field -> the only supported value

    def architecture(self, head: str) -> str:
        """Return the Hugging Face architecture of a model with this head."""
        return self.causal_lm if head == "lm" else self.sequence_classifier


#: Fields of every family, with transformers' defaults.
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

#: Megatron-Core has one switch for the biases of all linear layers. Dropout would make the trainer's log-probs differ from the
#: generator's.
COMMON_REQUIRED_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
}

EMBEDDING = Rule(
    ("embedding.word_embeddings.weight",), Sharding.VOCAB, (HfTensor("model.embed_tokens.weight", ("vocab", "hidden")),)
)
FINAL_NORM = Rule(
    ("decoder.final_layernorm.weight",), Sharding.REPLICATED, (HfTensor("model.norm.weight", ("hidden",)),)
)
LM_HEAD = Rule(("output_layer.weight",), Sharding.VOCAB, (HfTensor("lm_head.weight", ("vocab", "hidden")),))
SCORE_HEAD = Rule(("output_layer.weight",), Sharding.REPLICATED, (HfTensor("score.weight", ("labels", "hidden")),))
#: The last pipeline stage holds its own copy of tied embeddings.
TIED_LM_HEAD = Rule(("output_layer.weight",), Sharding.VOCAB, EMBEDDING.hf)

QKV_WEIGHT = Rule(
    ("self_attention.linear_qkv.weight",),
    Sharding.QKV,
    (
        HfTensor("self_attn.q_proj.weight", ("query", "hidden")),
        HfTensor("self_attn.k_proj.weight", ("key", "hidden")),
        HfTensor("self_attn.v_proj.weight", ("key", "hidden")),
    ),
)
QKV_BIAS = Rule(
    ("self_attention.linear_qkv.bias",),
    Sharding.QKV,
    (
        HfTensor("self_attn.q_proj.bias", ("query",)),
        HfTensor("self_attn.k_proj.bias", ("key",)),
        HfTensor("self_attn.v_proj.bias", ("key",)),
    ),
)
Q_NORM = Rule(
    ("self_attention.q_layernorm.weight",), Sharding.REPLICATED, (HfTensor("self_attn.q_norm.weight", ("head_dim",)),)
)
K_NORM = Rule(
    ("self_attention.k_layernorm.weight",), Sharding.REPLICATED, (HfTensor("self_attn.k_norm.weight", ("head_dim",)),)
)
ATTENTION_OUTPUT = Rule(
    ("self_attention.linear_proj.weight",), Sharding.ROW, (HfTensor("self_attn.o_proj.weight", ("hidden", "query")),)
)
NORMS = (
    Rule(
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        Sharding.REPLICATED,
        (HfTensor("input_layernorm.weight", ("hidden",)),),
    ),
    Rule(
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        Sharding.REPLICATED,
        (HfTensor("post_attention_layernorm.weight", ("hidden",)),),
    ),
)
MLP_AND_NORMS = (
    Rule(
        ("mlp.linear_fc1.weight",),
        Sharding.GATE_UP,
        (HfTensor("mlp.gate_proj.weight", ("ffn", "hidden")), HfTensor("mlp.up_proj.weight", ("ffn", "hidden"))),
    ),
    Rule(("mlp.linear_fc2.weight",), Sharding.ROW, (HfTensor("mlp.down_proj.weight", ("hidden", "ffn")),)),
    *NORMS,
)
ROUTER = Rule(("mlp.router.weight",), Sharding.REPLICATED, (HfTensor("mlp.gate.weight", ("num_experts", "hidden")),))
#: Names within an expert. Experts are never divided: in expert layers, expert parallelism takes the place of tensor parallelism.
EXPERT = (
    Rule(
        ("linear_fc1.weight",),
        Sharding.GATE_UP,
        (HfTensor("gate_proj.weight", ("ffn", "hidden")), HfTensor("up_proj.weight", ("ffn", "hidden"))),
    ),
    Rule(("linear_fc2.weight",), Sharding.ROW, (HfTensor("down_proj.weight", ("hidden", "ffn")),)),
)

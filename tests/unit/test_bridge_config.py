"""config.json -> TransformerConfig: what is mapped, what is refused, and rotary frequencies like transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bridge.model import layers
from megatron_bridge.model.config_mapping import BridgeConfig, bridge_config, read_hf_config
from megatron_bridge.model.rope import rope_frequencies, rope_parameters
from megatron_bridge.weights.export_hf import exported_config

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}


def _bridge(layout: dict[str, Any] | None = None, **fields: Any) -> BridgeConfig:
    return bridge_config({**CONFIG, **fields}, **{"dtype": torch.float32, **(layout or {})})


def test_sizes() -> None:
    bridge = _bridge(
        {
            "tensor": 2,
            "pipeline": 2,
            "virtual_pipeline": 2,
            "vocab_multiple": 128,
            "sequence": True,
            "dtype": torch.bfloat16,
        },
        rms_norm_eps=1e-5,
        rope_theta=5e5,
    )
    config = bridge.transformer
    assert (config.hidden_size, config.ffn_hidden_size, config.num_layers) == (64, 96, 4)
    assert (config.num_attention_heads, config.num_query_groups, config.kv_channels) == (8, 4, 8)
    assert (config.layernorm_epsilon, config.normalization, config.gated_linear_unit) == (1e-5, "RMSNorm", True)
    assert (config.params_dtype, config.pipeline_dtype, config.bf16) == (torch.bfloat16, torch.bfloat16, True)
    assert (bridge.vocab_size, bridge.padded_vocab_size) == (1000, 1024)
    assert bridge.rope["rotary_base"] == 5e5
    assert (bridge.pipeline_layout.pp_size, bridge.pipeline_layout.vp_size) == (2, 2)


def test_families_differ_where_they_should() -> None:
    llama, qwen2, qwen3 = (_bridge(model_type=model_type) for model_type in ("llama", "qwen2", "qwen3"))
    assert [b.transformer.add_qkv_bias for b in (llama, qwen2, qwen3)] == [False, True, False]
    assert [b.transformer.qk_layernorm for b in (llama, qwen2, qwen3)] == [False, False, True]
    assert [b.transformer.kv_channels for b in (llama, qwen2, qwen3)] == [8, 8, 128]
    assert not any(b.transformer.add_bias_linear for b in (llama, qwen2, qwen3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: llama, qwen2, qwen3"),
        ({"hidden_size": None}, "hidden_size missing"),
        ({"mlp_bias": True}, "mlp_bias True is not supported"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1 is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
            "use_sliding_window true with max_window_layers 2",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
            "layer_types has 'sliding_attention' at layer 3",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' needs factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, r"per layer type \(full_attention\)"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 is not a multiple of num_key_value_heads 3"),
        ({"num_attention_heads": 12, "num_key_value_heads": 4}, "hidden_size 64 is not a multiple"),
        ({"head_dim": 9}, "head_dim 9 is odd"),
    ],
)
def test_unsupported_checkpoints(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _bridge(**fields)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tensor": 8}, "tensor parallelism 8 exceeds num_key_value_heads 4"),
        ({"tensor": 3}, "tensor parallelism 3"),
        ({"pipeline": 3}, "num_hidden_layers 4 is not a multiple of pipeline 3 x virtual_pipeline 1 = 3"),
        ({"pipeline": 2, "virtual_pipeline": 4}, "= 8 stages"),
        ({"virtual_pipeline": 2}, "virtual_pipeline 2 needs pipeline parallelism"),
        ({"sequence": True}, "sequence parallelism needs tensor parallelism"),
        ({"expert": 2}, "expert parallelism 2"),
        (
            {"aligned": True, "context": 2},
            r"aligned has no context parallelism \(context 2\); change that, or set aligned",
        ),
        ({"recompute": "some"}, "recompute 'some' is not supported"),
        ({"dtype": torch.float16}, "dtype torch.float16 is not supported"),
    ],
)
def test_unsupported_layouts(layout: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _bridge(layout)


EXPERTS = {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


@pytest.mark.parametrize(
    ("layout", "fields", "message"),
    [
        ({"expert": 4}, {}, "num_experts 6 is not a multiple of expert parallelism 4; choose a divisor"),
        ({"tensor": 2}, {}, "mixture of experts .*sequence"),
        ({}, {"num_experts_per_tok": 7}, "num_experts_per_tok 7 exceeds num_experts 6"),
        ({}, {"decoder_sparse_step": 2}, "decoder_sparse_step 2 is not supported for model_type 'qwen3_moe'"),
        ({}, {"mlp_only_layers": [1]}, r"mlp_only_layers \[1\] is not supported"),
        ({}, {"output_router_logits": True}, "output_router_logits True is not supported"),
    ],
)
def test_unsupported_experts(layout: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _bridge(layout, **(EXPERTS | fields))


def test_aligned_vocabulary_is_padded_alike_for_every_tensor_parallel_size() -> None:
    sizes = [_bridge({"tensor": size, "aligned": True}, vocab_size=1001).padded_vocab_size for size in (1, 2, 4)]
    assert sizes == [1004] * 3


def test_aligned_refuses_experts_and_other_divisions() -> None:
    with pytest.raises(ValueError, match=r"aligned has no mixture of experts \(model_type 'qwen3_moe'\)"):
        _bridge({"aligned": True}, **EXPERTS)
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 60}
    with pytest.raises(ValueError, match="aligned needs tensor parallelism 1, 2 or 4, not 3"):
        _bridge({"aligned": True, "tensor": 3}, **heads)


def test_an_open_choice_is_aligned_where_model_layout_and_device_allow_it() -> None:
    """And says why it is not."""
    bf16 = {"dtype": torch.bfloat16, "aligned": None, "on_cuda": True}
    assert _bridge(bf16).aligned and _bridge({"aligned": None}).aligned and _bridge(bf16).plain_because is None
    for layout, why in (
        ({"dtype": torch.float32}, "needs bf16 on CUDA, not torch.float32"),
        ({"context": 2}, "has no context parallelism"),
    ):
        bridge = _bridge({**bf16, **layout})
        assert not bridge.aligned and bridge.plain_because is not None and bridge.plain_because.startswith(why)
    chosen = _bridge({**bf16, "aligned": False})
    assert not chosen.aligned and chosen.plain_because is None
    with pytest.raises(ValueError, match="aligned needs bf16 on CUDA"):
        _bridge({**bf16, "dtype": torch.float32, "aligned": True})


def test_window_that_no_layer_uses_is_accepted() -> None:
    _bridge(model_type="qwen2", use_sliding_window=False, sliding_window=64, max_window_layers=2)
    _bridge(model_type="qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=4)


ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 1e6},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 32.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 7.0,
        "original_max_position_embeddings": 100,
    },
    {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 64, "truncate": False},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "beta_fast": 20, "beta_slow": 2, "attention_factor": 0.9},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "mscale": 1.4, "mscale_all_dim": 0.7},
]


@pytest.mark.parametrize("parameters", ROPES)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_rope_frequencies_equal_transformers(model_type: str, parameters: dict[str, Any]) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    modules = {"llama": LlamaRotaryEmbedding, "qwen2": Qwen2RotaryEmbedding, "qwen3": Qwen3RotaryEmbedding}
    fields = {**CONFIG, "model_type": model_type, "rope_parameters": parameters, "head_dim": 64}
    theirs = modules[model_type](AutoConfig.for_model(**json.loads(json.dumps(fields))))
    inv_freq, scaling = rope_frequencies(rope_parameters(fields), 64, CONFIG["max_position_embeddings"])
    torch.testing.assert_close(inv_freq, theirs.inv_freq, rtol=3e-7, atol=0)
    assert scaling == pytest.approx(theirs.attention_scaling, rel=1e-12)


def test_both_spellings_of_rope_settings() -> None:
    new = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}}
    for old in (
        {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": None},
    ):
        a, b = _bridge(**new), _bridge(**old)
        assert torch.equal(a.inv_freq, b.inv_freq) and a.rope == b.rope
    assert rope_parameters({"rope_scaling": None}) == {"rope_type": "default", "rope_theta": 10_000.0}


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.2079, 3.0])
def test_attention_scaling_reaches_megatron(factor: float) -> None:
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
        _yarn_get_concentration_factor_from_config,
    )

    bridge = _bridge(
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "attention_factor": factor}
    )
    assert _yarn_get_concentration_factor_from_config(bridge.transformer) == pytest.approx(factor, rel=1e-14)


def test_transformer_engines_fused_rotation_is_used_where_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows no factor on cosine and sine, so YaRN stays with Megatron-Core's; and float32 models with the local layers."""
    from megatron.core.models.common.embeddings import rope_utils

    bf16 = {"dtype": torch.bfloat16}
    yarn = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}
    linear = {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}
    assert not _bridge(bf16).transformer.apply_rope_fusion
    monkeypatch.setattr(layers, "HAS_TRANSFORMER_ENGINE", True)
    assert not _bridge(bf16).transformer.apply_rope_fusion, "Megatron-Core could not import the kernel"
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", lambda *arguments: None)
    assert _bridge(bf16).transformer.apply_rope_fusion and _bridge(bf16, **linear).transformer.apply_rope_fusion
    assert not _bridge(bf16, **yarn).transformer.apply_rope_fusion
    assert not _bridge({**bf16, "aligned": True}).transformer.apply_rope_fusion
    assert not _bridge().transformer.apply_rope_fusion
    assert layers.uses_transformer_engine(torch.bfloat16) and not layers.uses_transformer_engine(torch.float32)


def test_read_hf_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config.json: no such file"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text('{\n"model_type": "llama",\n}')
    with pytest.raises(ValueError, match="config.json, line 3: not JSON"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert read_hf_config(tmp_path) == {"model_type": "llama"}


def test_exported_config_changes_nothing_else() -> None:
    source = dict(CONFIG, architectures=["LlamaForCausalLM"], torch_dtype="float32", custom={"a": 1})
    assert exported_config(source, "LlamaForCausalLM", "lm", torch.float32) == source
    scored = exported_config(source, "LlamaForSequenceClassification", "score", torch.bfloat16)
    changed = {name for name in scored if scored[name] != source.get(name)}
    assert changed == {"architectures", "torch_dtype", "id2label", "label2id"}
    assert scored["torch_dtype"] == "bfloat16"
    both = exported_config({"torch_dtype": "float32", "dtype": "float32"}, "LlamaForCausalLM", "lm", torch.bfloat16)
    assert both["torch_dtype"] == both["dtype"] == "bfloat16"

"""Map a Hugging Face config.json to Megatron-Core's TransformerConfig, and to everything else that a GPTModel needs."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bridge import platform

# isort: split
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_bridge.families.decoder import Family
from megatron_bridge.families.param_mapping import (
    Dims,
    ExpertLayout,
    PipelineLayout,
    check_tensor_parallel,
    padded_vocab_size,
)
from megatron_bridge.families.registry import family_of
from megatron_bridge.model.layers import uses_transformer_engine
from megatron_bridge.model.rope import rope_frequencies, rope_parameters, set_attention_scaling

#: Aligned log-probs sum over so many parts of the vocabulary, in order. The tensor-parallel size must divide it.
VOCAB_PARTS = 4

_REQUIRED_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
#: Further fields of a mixture of experts. transformers 5 writes num_local_experts where checkpoints had num_experts.
_MOE_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")


@dataclass(frozen=True, eq=False)
class BridgeConfig:
    """A checkpoint's config and a parallel layout, in Megatron-Core's form."""

    family: Family
    transformer: TransformerConfig
    hf_config: dict[str, Any]  # config.json, unedited
    vocab_size: int  # rows of the checkpoint's embedding
    padded_vocab_size: int  # rows of the model's embedding; the rows beyond vocab_size are zero
    max_position_embeddings: int  # tokens
    tie_word_embeddings: bool
    rope: dict[str, Any]  # keyword arguments of GPTModel
    inv_freq: Tensor  # [head_dim / 2] float32, installed by rope.install_rope
    attention_scaling: float  # factor on cosine and sine; `transformer` has it already
    aligned: bool = False  # True: the layers of megatron_bridge.aligned are used
    #: Why they are not used, if the choice was left open: "has no context parallelism (context 2)".
    plain_because: str | None = None

    @property
    def dims(self) -> Dims:
        """Sizes of the model that the weight rules need."""
        config = self.transformer
        return Dims(
            hidden=config.hidden_size,
            ffn=config.ffn_hidden_size,
            query=config.num_attention_heads * config.kv_channels,
            key=config.num_query_groups * config.kv_channels,
            head_dim=config.kv_channels,
            num_query_groups=config.num_query_groups,
            vocab=self.vocab_size,
            padded_vocab=self.padded_vocab_size,
            num_experts=config.num_moe_experts or 0,
        )

    @property
    def pipeline_layout(self) -> PipelineLayout:
        """Assignment of layers to pipeline ranks and model chunks."""
        config = self.transformer
        return PipelineLayout(
            num_layers=config.num_layers,
            pp_size=config.pipeline_model_parallel_size,
            vp_size=config.virtual_pipeline_model_parallel_size or 1,
        )

    @property
    def expert_layout(self) -> ExpertLayout:
        """Assignment of experts to expert-parallel ranks."""
        return ExpertLayout(self.transformer.num_moe_experts or 0, self.transformer.expert_model_parallel_size)


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """Read the config.json of a checkpoint folder, unchanged.

    Raises:
        ValueError: The file does not exist or is not JSON.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"{file}: no such file; give the folder of a Hugging Face checkpoint")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {error.lineno}: not JSON ({error.msg})") from error


def bridge_config(
    hf_config: dict[str, Any],
    *,
    dtype: torch.dtype,
    tensor: int = 1,
    pipeline: int = 1,
    virtual_pipeline: int | None = None,
    context: int = 1,
    expert: int = 1,
    sequence: bool = False,
    recompute: str | None = None,
    vocab_multiple: int = 1,
    aligned: bool | None = False,
    on_cuda: bool | None = None,
) -> BridgeConfig:
    """Map a Hugging Face config and a parallel layout to a ``BridgeConfig``.

    Args:
        hf_config: Contents of config.json, from ``read_hf_config``.
        dtype: Dtype of the parameters: torch.float32 or torch.bfloat16.
        tensor, pipeline, context, expert: Number of ranks of each kind of parallelism.
        virtual_pipeline: Number of model chunks per pipeline rank; None: one.
        sequence: Whether sequence parallelism divides the tokens over the tensor-parallel ranks.
        recompute: Activation recomputation: None, "selective" (the MLP, or the experts) or "full" (every layer).
        vocab_multiple: Factor of the padding: the vocabulary is padded to a multiple of vocab_multiple x tensor rows.
        aligned: Whether to build the layers of ``megatron_bridge.aligned``; the padded vocabulary is then the same for every ``tensor``. With
            None they are built if model, layout and device allow it.
        on_cuda: Whether the model will run on GPUs; None: if this machine has CUDA.

    Raises:
        ValueError: The checkpoint or the layout has an unsupported setting; the message gives its name and value.
    """
    family = family_of(hf_config)
    hf = _with_defaults(hf_config, family)
    _check_settings(hf, family)
    heads, groups, head_dim = _attention_sizes(hf)
    moe = bool(family.expert_rules)
    check_tensor_parallel(tensor, heads=heads, num_query_groups=groups, ffn=None if moe else hf["intermediate_size"])
    _check_layout(hf, tensor, pipeline, virtual_pipeline, sequence)
    _check_experts(hf, moe, tensor, expert, sequence)
    refusal = _aligned_refusal(
        hf, moe, tensor, context, dtype, on_cuda=platform.HAS_CUDA if on_cuda is None else on_cuda
    )
    if aligned and refusal is not None:
        raise ValueError(f"aligned {refusal}; change that, or set aligned to false")
    plain_because = refusal if aligned is None else None
    aligned = refusal is None if aligned is None else aligned
    if aligned:
        vocab_multiple *= VOCAB_PARTS // tensor
    parameters = rope_parameters(hf_config)
    inv_freq, attention_scaling = rope_frequencies(parameters, head_dim, hf["max_position_embeddings"])
    transformer = TransformerConfig(
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        ffn_hidden_size=hf["moe_intermediate_size" if moe else "intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=head_dim,
        layernorm_epsilon=hf["rms_norm_eps"],
        init_method_std=hf["initializer_range"],
        add_qkv_bias=family.qkv_bias,
        qk_layernorm=family.qk_layernorm,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual_pipeline,
        context_parallel_size=context,
        sequence_parallel=sequence,
        **_ARCHITECTURE,
        **_dtype_settings(dtype),
        **_machine_settings(),
        **_recompute_settings(recompute, moe),
        **(_moe_settings(hf, expert) if moe else {}),
        apply_rope_fusion=attention_scaling == 1.0 and not aligned and has_fused_rope(dtype),
    )
    set_attention_scaling(transformer, attention_scaling)
    return BridgeConfig(
        family=family,
        transformer=transformer,
        hf_config=hf_config,
        vocab_size=hf["vocab_size"],
        padded_vocab_size=padded_vocab_size(hf["vocab_size"], vocab_multiple * tensor),
        max_position_embeddings=hf["max_position_embeddings"],
        tie_word_embeddings=hf["tie_word_embeddings"],
        rope={"position_embedding_type": "rope", "rotary_percent": 1.0, "rotary_base": parameters["rope_theta"]},
        inv_freq=inv_freq,
        attention_scaling=attention_scaling,
        aligned=aligned,
        plain_because=plain_because,
    )


#: Settings that all supported families share.
_ARCHITECTURE: dict[str, Any] = {
    "normalization": "RMSNorm",
    "activation_func": F.silu,
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
}


def _dtype_settings(dtype: torch.dtype) -> dict[str, Any]:
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype {dtype} is not supported; use torch.float32 or torch.bfloat16")
    return {"bf16": dtype is torch.bfloat16, "params_dtype": dtype, "pipeline_dtype": dtype, "autocast_dtype": dtype}


def _machine_settings() -> dict[str, Any]:
    """Return the settings that depend on the machine. Fused kernels need CUDA; gloo mixes up batched sends of interleaved stages."""
    return {
        "use_cpu_initialization": not platform.HAS_CUDA,
        "batch_p2p_comm": platform.HAS_CUDA,
        "bias_activation_fusion": platform.HAS_CUDA,
        "bias_dropout_fusion": platform.HAS_CUDA,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
    }


def has_fused_rope(dtype: torch.dtype) -> bool:
    """Return whether Megatron-Core could import Transformer Engine's kernel that rotates queries and keys.

    The kernel has no factor on cosine and sine (YaRN's); with packed sequences Megatron-Core would drop it silently.
    """
    return uses_transformer_engine(dtype) and rope_utils.fused_apply_rotary_pos_emb is not None


def _recompute_settings(recompute: str | None, moe: bool) -> dict[str, Any]:
    """Return Megatron-Core's settings of activation recomputation.

    Attention kernels never store their scores, so "selective" saves the activations of the MLP.
    """
    if recompute is None:
        return {}
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["moe" if moe else "mlp"]}
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    raise ValueError(f"recompute {recompute!r} is not supported; use null, 'selective' or 'full'")


def _moe_settings(hf: dict[str, Any], expert: int) -> dict[str, Any]:
    """Return the settings of a mixture of experts.

    No token is dropped, and the router computes in the parameters' dtype, as inference libraries do.
    """
    return {
        "num_moe_experts": hf["num_experts"],
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        "moe_router_topk": hf["num_experts_per_tok"],
        # The softmax over only the chosen experts equals the softmax over all, divided by the sum of the chosen ones.
        "moe_router_pre_softmax": not hf["norm_topk_prob"],
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": expert,
        "expert_tensor_parallel_size": 1,
    }


def _with_defaults(hf_config: dict[str, Any], family: Family) -> dict[str, Any]:
    given = {name: value for name, value in hf_config.items() if value is not None}
    required: tuple[str, ...] = _REQUIRED_FIELDS
    if family.expert_rules:
        required += _MOE_FIELDS
        if "num_local_experts" in given:
            given.setdefault("num_experts", given["num_local_experts"])
    missing = [name for name in required if name not in given]
    if missing:
        raise ValueError(f"config.json: {', '.join(missing)} missing, needed for model_type {family.model_type!r}")
    return {**family.defaults, **given}


def _check_settings(hf: dict[str, Any], family: Family) -> None:
    for name, value in family.required_values.items():
        if hf[name] != value:
            raise ValueError(
                f"config.json: {name} {hf[name]!r} is not supported for model_type {family.model_type!r}; "
                f"only {value!r} is"
            )
    if hf.get("quantization_config") is not None:
        raise ValueError("config.json: quantization_config is not supported; give the unquantised checkpoint")
    sliding = [i for i, kind in enumerate(hf.get("layer_types") or ()) if kind != "full_attention"]
    if sliding:
        raise ValueError(
            f"config.json: layer_types has {hf['layer_types'][sliding[0]]!r} at layer {sliding[0]}; "
            "only full_attention is supported"
        )
    first_window = hf.get("max_window_layers", hf["num_hidden_layers"])
    in_use = hf.get("use_sliding_window", False) and hf.get("sliding_window") is not None
    if in_use and not hf.get("layer_types") and first_window < hf["num_hidden_layers"]:
        raise ValueError(
            f"config.json: use_sliding_window true with max_window_layers {first_window} is not supported; only full "
            "attention is"
        )


def _attention_sizes(hf: dict[str, Any]) -> tuple[int, int, int]:
    """Return attention heads, query groups and channels of a head."""
    heads, hidden = hf["num_attention_heads"], hf["hidden_size"]
    groups = hf["num_key_value_heads"] or heads
    if heads % groups:
        raise ValueError(f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    if hf["head_dim"] is None and hidden % heads:
        raise ValueError(
            f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}; set head_dim"
        )
    head_dim = hf["head_dim"] or hidden // heads
    if head_dim % 2:
        raise ValueError(f"config.json: head_dim {head_dim} is odd; rotary embeddings need pairs of channels")
    return heads, groups, head_dim


def _check_layout(hf: dict[str, Any], tensor: int, pipeline: int, virtual_pipeline: int | None, sequence: bool) -> None:
    if sequence and tensor == 1:
        raise ValueError("sequence parallelism needs tensor parallelism above 1; set sequence to false")
    if virtual_pipeline is not None and pipeline == 1:
        raise ValueError(f"virtual_pipeline {virtual_pipeline} needs pipeline parallelism above 1; leave it out")
    stages = pipeline * (virtual_pipeline or 1)
    if hf["num_hidden_layers"] % stages:
        raise ValueError(
            f"num_hidden_layers {hf['num_hidden_layers']} is not a multiple of pipeline {pipeline} x virtual_pipeline "
            f"{virtual_pipeline or 1} = {stages} stages; choose a divisor"
        )


def _aligned_refusal(
    hf: dict[str, Any], moe: bool, tensor: int, context: int, dtype: torch.dtype, *, on_cuda: bool
) -> str | None:
    """Return why a role cannot be aligned; None: it can. A plan for another machine assumes that its GPUs have Triton."""
    has_triton = importlib.util.find_spec("triton") is not None
    reasons = {
        # Triton's product of float32 matrices rounds them to TF32.
        f"needs bf16 on CUDA, not {dtype}: its products would round float32": on_cuda and dtype != torch.bfloat16,
        "needs Triton on CUDA, for Megatron-Core's batch-invariant kernels": platform.HAS_CUDA and not has_triton,
        f"has no mixture of experts (model_type {hf['model_type']!r})": moe,
        f"has no context parallelism (context {context})": context > 1,
        f"needs tensor parallelism 1, 2 or 4, not {tensor}": VOCAB_PARTS % tensor != 0,
        f"divides hidden_size {hf['hidden_size']} over {tensor} tensor-parallel ranks": hf["hidden_size"] % tensor != 0,
    }
    return next((reason for reason, refused in reasons.items() if refused), None)


def _check_experts(hf: dict[str, Any], moe: bool, tensor: int, expert: int, sequence: bool) -> None:
    if not moe:
        if expert != 1:
            raise ValueError(f"expert parallelism {expert}: model_type {hf['model_type']!r} is dense, use 1")
        return
    if hf["num_experts"] % expert:
        raise ValueError(
            f"num_experts {hf['num_experts']} is not a multiple of expert parallelism {expert}; choose a divisor"
        )
    if hf["num_experts_per_tok"] > hf["num_experts"]:
        raise ValueError(
            f"config.json: num_experts_per_tok {hf['num_experts_per_tok']} exceeds num_experts {hf['num_experts']}"
        )
    if tensor > 1 and not sequence:
        raise ValueError(
            f"tensor parallelism {tensor} of a mixture of experts needs sequence parallelism, which gives every rank tokens of "
            "its own to route; set sequence to true"
        )

"""Rotary frequencies of a Hugging Face config, and their installation in a GPTModel.

Megatron-Core's own RoPE scaling has fixed constants (llama3: low 1, high 4, original context 8192) and reads YaRN's from attributes that
its config class lacks. So this module computes the frequencies as the checkpoint's config asks, and replaces those of the built model.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import megatron_bridge.platform  # noqa: F401

# isort: split
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

DEFAULT_THETA = 10_000.0
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def rope_parameters(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Return RoPE settings in one form, from ``rope_parameters`` (transformers 5) or from ``rope_theta`` and ``rope_scaling``.

    Raises:
        ValueError: The bridge does not support the rope type, a partial rotary factor, or settings per layer type.
    """
    source = "rope_scaling" if hf_config.get("rope_scaling") else "rope_parameters"
    parameters = dict(hf_config.get(source) or {})
    nested = [name for name, value in parameters.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(f"config.json: {source} per layer type ({', '.join(nested)}) is not supported")
    parameters.setdefault("rope_theta", hf_config.get("rope_theta") or DEFAULT_THETA)
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    if parameters["rope_type"] not in ROPE_TYPES:
        raise ValueError(
            f"config.json: {source}.rope_type {parameters['rope_type']!r} is not supported; supported: "
            f"{', '.join(ROPE_TYPES)}"
        )
    partial = parameters.get("partial_rotary_factor", hf_config.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1.0):
        raise ValueError(f"config.json: partial_rotary_factor {partial} is not supported; only 1.0 is")
    if hf_config.get("original_max_position_embeddings") is not None:
        parameters["original_max_position_embeddings"] = hf_config["original_max_position_embeddings"]
    return parameters


def rope_frequencies(parameters: dict[str, Any], head_dim: int, max_position_embeddings: int) -> tuple[Tensor, float]:
    """Compute the inverse frequencies and the factor on cosine and sine.

    Args:
        parameters: Settings from ``rope_parameters``.
        head_dim: Number of channels of one attention head, all of them rotated.
        max_position_embeddings: Original context length if the parameters don't name one.

    Returns:
        inv_freq [head_dim / 2] float32, radians per position; attention scaling, 1.0 except for YaRN.

    Raises:
        ValueError: A parameter that the rope type needs is missing.
    """
    rope_type = parameters["rope_type"]
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inv_freq = 1.0 / (parameters["rope_theta"] ** exponents)
    if rope_type == "default":
        return inv_freq, 1.0
    needed = ("factor", "low_freq_factor", "high_freq_factor") if rope_type == "llama3" else ("factor",)
    missing = [name for name in needed if parameters.get(name) is None]
    if missing:
        raise ValueError(f"config.json: rope_type {rope_type!r} needs {', '.join(missing)} in its rope parameters")
    original = parameters.get("original_max_position_embeddings") or max_position_embeddings
    if rope_type == "linear":
        return inv_freq / parameters["factor"], 1.0
    if rope_type == "llama3":
        return _llama3(inv_freq, parameters, original), 1.0
    return _yarn(inv_freq, parameters, head_dim, original), _yarn_attention_scaling(parameters)


def _llama3(inv_freq: Tensor, parameters: dict[str, Any], original: int) -> Tensor:
    """Scale frequencies as Llama 3.1 does: interpolate long wavelengths, keep short ones, and blend linearly between."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    rotations = original / (2 * math.pi / inv_freq)
    keep = ((rotations - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * inv_freq / parameters["factor"] + keep * inv_freq


def _yarn(inv_freq: Tensor, parameters: dict[str, Any], head_dim: int, original: int) -> Tensor:
    """Scale frequencies as YaRN does (Peng et al. 2023, section 3.2): "NTK-by-parts" interpolation between two numbers of rotations."""

    def channel(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(parameters["rope_theta"]))

    low, high = channel(parameters.get("beta_fast") or 32), channel(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    interpolate = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return inv_freq / parameters["factor"] * interpolate + inv_freq * (1 - interpolate)


def _yarn_attention_scaling(parameters: dict[str, Any]) -> float:
    """Return the factor on cosine and sine (Peng et al. 2023, equation 22), unless the config sets it itself."""

    def scale(weight: float) -> float:
        return 1.0 if parameters["factor"] <= 1 else 0.1 * weight * math.log(parameters["factor"]) + 1.0

    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return scale(parameters["mscale"]) / scale(parameters["mscale_all_dim"])
    return scale(1.0)


def set_attention_scaling(config: TransformerConfig, scaling: float) -> None:
    """Make Megatron-Core's attention multiply cosine and sine by ``scaling``.

    It computes the factor as ``0.1 * yarn_mscale * ln(yarn_rotary_scaling_factor) + 1`` from attributes that a config has only if somebody
    sets them. With ``yarn_rotary_scaling_factor`` e, the logarithm is 1 and ``yarn_mscale`` alone carries the value.
    """
    if scaling == 1.0:
        return
    config.yarn_rotary_scaling_factor = math.e
    config.yarn_mscale = (scaling - 1.0) / 0.1
    config.yarn_mscale_all_dim = 0.0


def install_rope(model: GPTModel, inv_freq: Tensor) -> None:
    """Replace the rotary frequencies of a model that was just built and has not run yet.

    Args:
        model: Model to change.
        inv_freq: Frequencies of the checkpoint, [head_dim / 2] float32.
    """
    rotary = model.rotary_pos_emb
    assert rotary.inv_freq.shape == inv_freq.shape, (rotary.inv_freq.shape, inv_freq.shape)
    rotary.inv_freq = inv_freq.to(rotary.inv_freq.device)

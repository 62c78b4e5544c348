"""Model families by Hugging Face ``model_type``. A new family is one file and one entry here."""

from __future__ import annotations

from typing import Any

from megatron_bridge.families import llama, qwen2, qwen3, qwen3_moe
from megatron_bridge.families.decoder import Family

FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in (llama, qwen2, qwen3, qwen3_moe)}


def family_of(hf_config: dict[str, Any]) -> Family:
    """Return the family of a Hugging Face config.

    Raises:
        ValueError: The config's ``model_type`` is missing or not supported.
    """
    model_type = hf_config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"config.json: model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]

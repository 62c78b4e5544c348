"""Rules of the folder of a model: what it holds, and whether the run can load it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hetero_ppo.config.require import require
from hetero_ppo.config.schema import ModelConfig

ADAPTER_FILE = "adapter_config.json"
#: Endings of the names of files with weights in other formats.
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


def check_model_folder(role: str, model: ModelConfig) -> None:
    """Raise where a role's folder is no Hugging Face checkpoint with safetensors that the run can load.

    Args:
        role: Path of the role's section.
        model: Section of its model.

    Raises:
        ValueError: The message names field, folder and fix.
    """
    field, path = f"{role}.model.path", model.path
    require(os.path.isdir(path), field, path, "no such folder; give a Hugging Face checkpoint folder on this machine")
    files = sorted(os.listdir(path))
    _refuse_other_formats(field, path, files)
    read_model_config(field, path)
    require(
        any(file.endswith(".safetensors") for file in files),
        field,
        path,
        "the folder has no *.safetensors file; save the model with safetensors",
    )
    _check_file_names(field, path)
    tokenizer = model.tokenizer
    require(tokenizer is None or os.path.isdir(tokenizer), f"{role}.model.tokenizer", tokenizer, "no such folder")


def _refuse_other_formats(field: str, path: str, files: list[str]) -> None:
    """Raise for a LoRA adapter, and for weights in other formats than safetensors."""
    require(
        ADAPTER_FILE not in files,
        field,
        path,
        f"the folder has {ADAPTER_FILE}: a LoRA adapter, which would not be loaded. Merge it into its model with peft "
        f"(AutoPeftModelForCausalLM.from_pretrained({path!r}).merge_and_unload().save_pretrained(...)) and give that folder, or take "
        "the file away to train the model without it",
    )
    others = [file for file in files if file.endswith(OTHER_WEIGHTS)]
    require(
        not others or any(file.endswith(".safetensors") for file in files),
        field,
        path,
        f"the folder has weights as {', '.join(others[:3])} and no *.safetensors file; load it with transformers and save it with "
        "save_pretrained, which writes safetensors",
    )


def _check_file_names(field: str, path: str) -> None:
    from megatron_bridge.weights.hf_checkpoint import check_names  # torch takes seconds to import

    try:
        check_names(Path(path))
    except ValueError as error:
        raise ValueError(f"{field}={path}: {error}") from error


def read_model_config(field: str, path: str) -> dict[str, Any]:
    """Return config.json of a checkpoint folder.

    Args:
        field: Field that names the folder, for the message.
        path: Path of the folder.

    Raises:
        ValueError: The file is missing or not JSON.
    """
    file = os.path.join(path, "config.json")
    require(os.path.isfile(file), field, path, "the folder has no config.json; give a Hugging Face checkpoint folder")
    try:
        with open(file, encoding="utf-8") as stream:
            return json.load(stream)
    except ValueError as error:
        raise ValueError(f"{field}={path}: config.json is not valid JSON: {error}") from error


def check_context_length(role: str, model: ModelConfig, longest: tuple[int, str]) -> None:
    """Raise where the longest sequence exceeds the positions that the model was made for. Scaled RoPE is left to the user.

    Args:
        role: Path of the role's section.
        model: Section of its model.
        longest: Tokens of the longest sequence that the role reads, and the fields that they come from.

    Raises:
        ValueError: The message names fields, length and limit.
    """
    tokens, fields = longest
    values = read_model_config(f"{role}.model.path", model.path)
    scaling = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if scaling.get("rope_type", scaling.get("type", "default")) == "default" and "max_position_embeddings" in values:
        limit = values["max_position_embeddings"]
        require(
            tokens <= limit,
            fields,
            tokens,
            f"{role}.model.path has max_position_embeddings {limit}; lower the length or use a longer model",
        )

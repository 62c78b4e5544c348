"""Model folders that look like a checkpoint and are none that can be loaded."""

from __future__ import annotations

import os

from hetero_ppo.config.derived import config_roles
from hetero_ppo.config.load import AnyConfig
from hetero_ppo.config.require import require

ADAPTER_FILE = "adapter_config.json"
#: Ends of files with weights in other formats.
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


def check_model_files(config: AnyConfig) -> None:
    """Refuse LoRA adapters and weights in other formats than safetensors, with what to do about them."""
    for name, role in config_roles(config).items():
        field, path = f"{name}.model.path", role.model.path
        if not os.path.isdir(path):
            continue  # ``check_model_folders`` has the message
        files = sorted(os.listdir(path))
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

"""Between Hugging Face checkpoints and Megatron-Core. It knows nothing of reinforcement learning, and is not NVIDIA's Megatron-Bridge.

Start at ``model_provider.py`` for how a model is built, and at ``weights/import_hf.py`` for how its weights are loaded.
Importing any module of this package makes Megatron-Core fit the machine (``platform``), before a module of Megatron-Core is loaded.
"""

import megatron_bridge.platform  # noqa: F401

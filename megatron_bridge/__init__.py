"""Convert between Hugging Face checkpoints and Megatron-Core models. The package knows nothing of reinforcement learning.

It is not NVIDIA's Megatron-Bridge. Start at ``model_provider.py`` to see how a model is built, and at ``weights/import_hf.py`` to see how
its weights are loaded. Importing any module of this package first adapts Megatron-Core to the machine (``platform``).
"""

import megatron_bridge.platform  # noqa: F401

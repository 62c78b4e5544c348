"""Layers, attention, packing and heads of the models, and the configuration that Megatron-Core builds them from.

Start at ``model_provider.py``, then ``layers.py``.
The import makes Megatron-Core fit the machine before any module below loads it.
"""

import megatron_bridge.platform  # noqa: F401

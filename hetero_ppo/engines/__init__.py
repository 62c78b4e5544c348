"""The model of a role: forward, training step, and its bytes on the device that the roles share.

Nothing is exported here; the import makes Megatron-Core fit the machine before any module below loads it. Start at ``model_engine.py``;
``shared_device.py`` has the turns.
"""

import megatron_bridge.platform  # noqa: F401

"""The decoder: responses from the Megatron model of a role, with a key-value cache and slots that free themselves.

Start at ``decoder.py``.
The import makes Megatron-Core fit the machine before any module below loads it.
"""

import megatron_bridge.platform  # noqa: F401

"""The decoder: responses from a role's own Megatron model, and beam search over any generator.

Start at ``decoder.py``.
The import makes Megatron-Core fit the machine before any module below loads it.
"""

import megatron_bridge.platform  # noqa: F401

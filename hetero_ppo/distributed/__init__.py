"""Process groups of the roles, collectives and statistics over ranks.

Nothing is exported here; the import makes Megatron-Core fit the machine before any module below loads it. Start at ``groups.py``.
"""

import megatron_bridge.platform  # noqa: F401

"""Nothing is exported here; the import makes Megatron-Core fit the machine before any module below loads it."""

import megatron_bridge.platform  # noqa: F401

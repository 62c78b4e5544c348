"""Rules for the deadlines of what is stopped or hangs."""

from __future__ import annotations

from hetero_ppo.config.load import AnyConfig
from hetero_ppo.config.require import require
from hetero_ppo.config.schema import PpoConfig

#: Some beats, so that a busy machine ends no run.
MIN_HEARTBEAT_TIMEOUT_S = 4.0
#: Some looks at a server.
MIN_HANG_TIMEOUT_S = 5.0


def check_heartbeats(config: AnyConfig, world_size: int) -> None:
    """Raise ValueError for a deadline that a rank that lives may miss."""
    value = config.run.heartbeat_timeout_s
    wish = f"{MIN_HEARTBEAT_TIMEOUT_S:g} s or more, or null"
    require(value is None or value >= MIN_HEARTBEAT_TIMEOUT_S, "run.heartbeat_timeout_s", value, wish)


def check_server_hangs(config: PpoConfig, world_size: int) -> None:
    """Raise ValueError for a deadline that a server that lives may miss."""
    value = config.rollout.hang_timeout_s
    wish = f"{MIN_HANG_TIMEOUT_S:g} s or more, or null"
    require(value is None or value >= MIN_HANG_TIMEOUT_S, "rollout.hang_timeout_s", value, wish)

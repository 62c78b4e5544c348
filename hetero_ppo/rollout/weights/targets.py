"""The models of a server that a weight sync can replace, by name. Messages to the servers carry the name."""

from __future__ import annotations

#: The model that answers prompts.
POLICY = "policy"
#: Every target. The server has a handler for each (``worker_extension.HANDLERS``).
TARGETS = (POLICY,)


def check_target(target: str) -> None:
    """Raise ValueError when no server has such a target."""
    if target not in TARGETS:
        raise ValueError(f"weight sync: there is no target {target!r}; the targets are {', '.join(TARGETS)}")

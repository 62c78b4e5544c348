"""The message of a rank whose collective failed because another rank is gone."""

from __future__ import annotations

import re

import torch.distributed as dist

#: Part of the text of gloo's errors, which have no class of their own.
GLOO = "gloo/transport/"
#: Address of the other end of a connection, which logs of the network have too.
PEER = re.compile(r"\[([\w.:]+)\]:(\d+)")


def describe_lost_peer(error: RuntimeError, phase: str, timeout_minutes: float) -> str | None:
    """Return one line for an error of a collective; None for any other error.

    The line has this rank, its phase, the peer where it is known, and the backend's reason.

    Args:
        error: The error.
        phase: Phase of the step in which it was raised; empty: outside of all phases.
        timeout_minutes: Deadline of the collectives.
    """
    text = str(error)
    if not isinstance(error, dist.DistBackendError) and GLOO not in text:
        return None
    reason = " ".join(text.split()).rpartition("] ")[2] if GLOO in text else " ".join(text.split())
    what = f"a collective failed: {reason}"
    found = PEER.search(text)
    if found is not None and "by peer" in text:
        what = f"the peer at {found[1]}:{found[2]} has ended"
    elif "Timed out" in text:
        what = f"a peer did not come to a collective within run.timeout_minutes={timeout_minutes:g}"
    where = f"phase {phase}" if phase else "outside of the phases of a step"
    return f"rank {dist.get_rank()}, {where}: {what}. The first error above, or the launcher's line below, says which rank and why"

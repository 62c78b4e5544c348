"""What a rank says when a collective fails because another rank is not there."""

from __future__ import annotations

import re

import torch.distributed as dist

#: In the text of every error of gloo's, which are RuntimeErrors like others.
GLOO = "gloo/transport/"
#: The address of the other end: of its connection, by which a log of the network knows it.
PEER = re.compile(r"\[([\w.:]+)\]:(\d+)")


def describe_lost_peer(error: RuntimeError, phase: str, timeout_minutes: float) -> str | None:
    """One line for an error of a collective: this rank, its phase, the peer where it is known, and what the backend says.

    Args:
        error: any.
        phase: in which it was raised; empty: outside of all.
        timeout_minutes: the collectives' deadline.

    Returns:
        None for an error of anything else.
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

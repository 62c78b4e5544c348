"""Text and JSON between ranks, as UTF-8 bytes: nothing is pickled."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist


def broadcast_text(text: str, source: int, group: dist.ProcessGroup) -> str:
    """Return the text of one rank on every rank of a group. Two collectives.

    Args:
        text: The text, read on ``source`` alone.
        source: Global rank of a member.
        group: The group.
    """
    raw = text.encode()
    length = torch.tensor([len(raw)])
    dist.broadcast(length, source, group=group)
    data = torch.zeros(int(length), dtype=torch.uint8)
    if dist.get_global_rank(group, group.rank()) == source and raw:
        data[:] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    dist.broadcast(data, source, group=group)
    return bytes(data.tolist()).decode()


def broadcast_json(value: Any, source: int, group: dist.ProcessGroup) -> Any:
    """Return a value of one rank on every rank of a group, as ``broadcast_text`` does with a text.

    Args:
        value: Value of JSON, read on ``source`` alone; tuples come as lists.
        source: Global rank of a member.
        group: The group.
    """
    return json.loads(broadcast_text(json.dumps(value), source, group))

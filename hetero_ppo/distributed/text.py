"""Text and JSON between ranks, as UTF-8 bytes: nothing is pickled."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist


def broadcast_text(text: str, source: int, group: dist.ProcessGroup | None = None) -> str:
    """The text of rank ``source`` of the world on every rank of the group. Two collectives.

    Args:
        text: read on ``source`` alone.
        source: global rank.
        group: None: the world.
    """
    raw = text.encode()
    length = torch.tensor([len(raw)])
    dist.broadcast(length, source, group=group)
    data = torch.zeros(int(length), dtype=torch.uint8)
    if dist.get_rank() == source and raw:
        data[:] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    dist.broadcast(data, source, group=group)
    return bytes(data.tolist()).decode()


def broadcast_json(value: Any, source: int, group: dist.ProcessGroup | None = None) -> Any:
    """As ``broadcast_text``, of a value of lists, objects, strings and numbers. Tuples come as lists."""
    return json.loads(broadcast_text(json.dumps(value), source, group))

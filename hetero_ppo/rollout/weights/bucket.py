"""Tensors one after the other in one block of bytes: the unit in which weights are packed, sent and stored."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_bridge.platform.copies import pinned_host_memory, release_pinned

#: safetensors' name of every dtype that weights are sent in.
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Bucket:
    """Tensors one after the other, as in a safetensors file. On a GPU the block is alone in its storage, so that it can be shared."""

    header: dict[str, Any]  # tensor name -> dtype, shape, data_offsets
    data: Tensor  # [bytes] uint8

    def tensors(self) -> dict[str, Tensor]:
        """Return views of the block, by tensor name."""
        return {
            name: self.data[slice(*entry["data_offsets"])].view(TORCH_DTYPES[entry["dtype"]]).view(entry["shape"])
            for name, entry in self.header.items()
        }


def bucket_header(tensors: dict[str, Tensor]) -> tuple[dict[str, Any], int]:
    """Return the safetensors header of tensors that lie one after the other, and their number of bytes."""
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    return header, offset


def num_bytes(header: dict[str, Any]) -> int:
    """Return the number of bytes of the block that a header describes."""
    return max(entry["data_offsets"][1] for entry in header.values())


def pack(tensors: dict[str, Tensor]) -> Bucket:
    """Copy contiguous tensors of one device into a bucket on that device."""
    header, _ = bucket_header(tensors)
    return Bucket(header, torch.cat([tensor.view(-1).view(torch.uint8) for tensor in tensors.values()]))


def map_bucket(path: Path) -> Bucket:
    """Map a safetensors file. Its bytes are read from the file when they are used."""
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    start = 8 + header_bytes
    whole = torch.from_file(str(path), shared=False, size=start + num_bytes(header), dtype=torch.uint8)
    return Bucket(header, whole[start:])


class PinnedStaging:
    """Page-locked host memory for copies between host and device. It holds one bucket at a time and is kept for the next sync."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def take(self, num_bytes: int) -> Tensor:
        """Return [num_bytes] uint8. The next call overwrites it.

        Raises:
            RuntimeError: The host memory cannot be page-locked.
        """
        if self._memory is None or self._memory.numel() < num_bytes:
            self.close()
            self._memory = pinned_host_memory(num_bytes)
        return self._memory[:num_bytes]

    def close(self) -> None:
        """Release the memory. May be called more than once."""
        if self._memory is not None:
            release_pinned(self._memory)
            self._memory = None

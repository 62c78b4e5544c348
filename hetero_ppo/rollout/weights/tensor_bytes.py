"""The bytes of a tensor, and their checksums: CRC-32 of host memory, and one that a device computes where the bytes are."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

#: Lanes that ``lane_checksum`` multiplies with their positions at a time: its temporaries take 8 bytes a lane.
ROW_LANES = 1 << 16
ROWS = 1 << 8
_WORD = (1 << 64) - 1


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, which must outlive the view.

    Not by way of numpy: ``Tensor.numpy`` marks the storage as never to be resized, and these are views of live parameters,
    whose storage is released when their role leaves the device.
    """
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    num_bytes = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_ubyte * num_bytes).from_address(tensor.data_ptr())).cast("B")


def tensor_checksum(tensor: Tensor) -> str:
    """CRC-32 of a contiguous CPU tensor's bytes, as hex.

    It is there against mistakes, not against an adversary, and sees any change of up to 32 bits in a row for certain. SHA-256 takes
    3.5 times as long (1.9 GB/s on a core where this takes 6.6), three times a sync.
    """
    return f"{zlib.crc32(tensor_bytes(tensor)):08x}"


def host_checksum(tensor: Tensor) -> str:
    """Return the CRC-32 of a tensor's bytes, wherever it lies; see ``tensor_checksum``."""
    return tensor_checksum(tensor.to("cpu").contiguous())


def checksum_on(device: torch.device) -> Callable[[Tensor], str]:
    """Return the checksum for tensors of a device: CRC-32 in host memory, sums of lanes on a GPU."""
    return host_checksum if device.type == "cpu" else lane_checksum


def lane_checksum(tensor: Tensor) -> str:
    """Return a checksum that is computed on the tensor's own device, by integer sums in one pass; a CPU and a GPU give the same.

    The bytes are read as n signed 16-bit lanes v_1 .. v_n, little-endian. The checksum is n and the two sums

        A = sum of v_i,    B = sum of i * v_i,    both modulo 2^64,

    as hexadecimal digits ``n-A-B``. The order of summation plays no part, so the value is exact on any device.

    It sees for certain (positions stay below 2^47, which is 256 TiB): any change within one lane, so every flipped bit, because B changes by
    i * d with 0 < |d| < 2^16; any change of two lanes, two that are swapped among them, because A stays only where the changes
    are d and -d, and then B changes by (i - j) * d; another length. Tensors that are swapped are seen by their names, each of which
    has its own checksum. Three changed lanes and more can cancel: it is there against mistakes, not against an adversary.

    On a CPU it takes several times as long as CRC-32 (docs/rollout.md), which host memory keeps.

    Args:
        tensor: Elements of 2 or 4 bytes, contiguous or not.
    """
    lanes = tensor.detach().contiguous().view(-1).view(torch.int16)
    weights = torch.arange(1, min(ROW_LANES, lanes.numel()) + 1, device=lanes.device)
    total = moment = torch.zeros((), dtype=torch.int64, device=lanes.device)
    for start in range(0, lanes.numel(), ROW_LANES * ROWS):
        part = lanes[start : start + ROW_LANES * ROWS]
        whole = part[: part.numel() // ROW_LANES * ROW_LANES].view(-1, ROW_LANES)
        for rows, begin in ((whole, start), (part[whole.numel() :].view(1, -1), start + whole.numel())):
            if rows.numel() == 0:
                continue
            sums = rows.sum(1, dtype=torch.int64)
            first = begin + ROW_LANES * torch.arange(rows.shape[0], device=lanes.device)
            moment = moment + (rows * weights[: rows.shape[1]]).sum() + (first * sums).sum()
            total = total + sums.sum()
    values = torch.stack((total, moment)).tolist()  # int64 wraps at 2^64, as the definition does
    return f"{lanes.numel():x}-{values[0] & _WORD:016x}-{values[1] & _WORD:016x}"

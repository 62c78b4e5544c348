"""The bytes of a tensor and their checksums: CRC-32 in host memory, and sums that a device computes where the bytes are."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

#: ``lane_checksum`` multiplies ``ROWS`` rows of ``ROW_LANES`` lanes with their positions at a time. Its temporaries take 8 bytes a lane.
ROW_LANES = 1 << 16
ROWS = 1 << 8
_WORD = (1 << 64) - 1


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, which must outlive the view.

    It avoids ``Tensor.numpy``, which marks the storage as never to be resized. These are views of live parameters,
    whose storage is released when their role leaves the device.
    """
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    num_bytes = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_ubyte * num_bytes).from_address(tensor.data_ptr())).cast("B")


def tensor_checksum(tensor: Tensor) -> str:
    """Return the CRC-32 of a contiguous CPU tensor's bytes, as hexadecimal digits.

    It detects mistakes, not an adversary, and certainly any change of up to 32 bits in a row. SHA-256 takes
    3.5 times as long (1.9 GB/s on a core where CRC-32 had 6.6), and a sync computes checksums three times.
    """
    return f"{zlib.crc32(tensor_bytes(tensor)):08x}"


def host_checksum(tensor: Tensor) -> str:
    """Return the CRC-32 of a tensor's bytes, wherever they are; see ``tensor_checksum``."""
    return tensor_checksum(tensor.to("cpu").contiguous())


def checksum_on(device: torch.device) -> Callable[[Tensor], str]:
    """Return the checksum for tensors of a device: CRC-32 in host memory, sums of lanes on a GPU."""
    return host_checksum if device.type == "cpu" else lane_checksum


def lane_checksum(tensor: Tensor) -> str:
    """Return a checksum that is computed on the tensor's own device, by integer sums in one pass; a CPU and a GPU give the same.

    The bytes are read as n signed 16-bit lanes v_1 .. v_n, little-endian. The checksum is n and the two sums

        A = sum of v_i,    B = sum of i * v_i,    both modulo 2^64,

    as hexadecimal digits ``n-A-B``. The order of summation plays no part, so the value is exact on any device.

    It certainly detects the following (positions stay below 2^47, which is 256 TiB):

    - any change within one lane, so every flipped bit: B changes by i * d with 0 < |d| < 2^16;
    - any change of two lanes, so two that are swapped: A stays only if the changes are d and -d, and then B changes by (i - j) * d;
    - another length.

    Each name has its own checksum, so swapped tensors are detected. Three or more changed lanes can cancel each other: the checksum detects
    mistakes, not an adversary. On a CPU it takes several times as long as CRC-32 (docs/rollout.md), which host memory uses therefore.

    Args:
        tensor: Tensor with elements of 2 or 4 bytes, contiguous or not.
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

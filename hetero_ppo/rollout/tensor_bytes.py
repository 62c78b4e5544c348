"""The bytes of a tensor, and their checksum."""

from __future__ import annotations

import ctypes
import hashlib

from torch import Tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, which must outlive the view.

    Not by way of numpy: ``Tensor.numpy`` marks the storage as never to be resized, and these are views of live parameters,
    whose storage is released when their role leaves the device.
    """
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    num_bytes = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_ubyte * num_bytes).from_address(tensor.data_ptr())).cast("B")


def tensor_checksum(tensor: Tensor) -> str:
    """SHA-256 of a contiguous CPU tensor's bytes."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()

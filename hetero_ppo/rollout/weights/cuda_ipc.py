"""Shares a block of device memory with another process on the same GPU. The block's handle is JSON; nothing is pickled.

Rules of ownership (see "CUDA IPC and the caching allocator" in torch.multiprocessing.reductions):

- The handle names the allocation that the block is in, and the block's offset. The receiver reads the sender's own memory, and freed
  memory is used again. So the sender must keep the block until every receiver has answered that it is done.
- torch counts the receivers that opened the handle, in a file of shared memory. A block that the sender frees earlier is kept until the
  receiver's storage is gone. A handle is for one receiver, which opens it once: each opening gives its count back once.
- The handle names an event of the sender's stream, and opening waits for it. So the block may still be written when the handle is sent.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

_BYTES_FIELDS = ("handle", "ref_counter_handle", "event_handle")


def device_id(device: torch.device) -> str:
    """Return a name of a GPU that is the same in every process, whatever CUDA_VISIBLE_DEVICES is there; ``cpu`` for the CPU."""
    return "cpu" if device.type == "cpu" else str(torch.cuda.get_device_properties(device).uuid)


@dataclass(frozen=True)
class IpcHandle:
    """The values of ``UntypedStorage._share_cuda_``, in its order, without the sender's index of the device."""

    handle: bytes  # handle of the allocation
    num_bytes: int  # size of the storage
    offset_bytes: int  # offset of the storage in the allocation
    ref_counter_handle: bytes
    ref_counter_offset: int
    event_handle: bytes
    event_sync_required: bool

    @classmethod
    def of(cls, block: Tensor) -> Self:
        """Return the handle of a block.

        Args:
            block: [bytes] uint8 on a GPU, alone in its storage. The caller keeps it until the receiver is done.
        """
        assert block.device.type == "cuda" and block.storage_offset() == 0
        _, *fields = block.untyped_storage()._share_cuda_()
        return cls(*fields)

    def open(self, device: torch.device) -> Tensor:
        """Return the sender's memory, [bytes] uint8. Drop every reference to it before you tell the sender that you are done.

        Args:
            device: GPU that the block is on, by this process' index.
        """
        torch.cuda.init()
        storage = torch.UntypedStorage._new_shared_cuda(
            device.index,
            self.handle,
            self.num_bytes,
            self.offset_bytes,
            self.ref_counter_handle,
            self.ref_counter_offset,
            self.event_handle,
            self.event_sync_required,
        )
        return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)

    def to_json(self) -> dict[str, Any]:
        """Return the handle as JSON, with bytes as hexadecimal digits."""
        fields = asdict(self)
        return fields | {name: fields[name].hex() for name in _BYTES_FIELDS}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Return the handle that ``to_json`` described."""
        return cls(**(fields | {name: bytes.fromhex(fields[name]) for name in _BYTES_FIELDS}))

"""A block of device memory of one process as another process on the same GPU sees it. Its handle is JSON; nothing is pickled.

Who owns what (see "CUDA IPC and the caching allocator" in torch.multiprocessing.reductions):

- The handle is of the allocation that the block lies in, with the block's offset. The sender must keep the block until every receiver has
  said that it is done: the receiver reads the sender's own memory, and freed memory is handed out again.
- torch counts a receiver that opened the handle, in a file of shared memory, and keeps the sender's block back, once freed, until the
  receiver's storage is gone. A handle is for one receiver and for one opening: each opening gives its count back once.
- The handle names an event of the sender's stream; opening waits for it, so the block may still be being written when it is sent.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

_BYTES_FIELDS = ("handle", "ref_counter_handle", "event_handle")


def device_id(device: torch.device) -> str:
    """Names a GPU the same in every process, whatever it may see (CUDA_VISIBLE_DEVICES); ``cpu`` for the CPU."""
    return "cpu" if device.type == "cpu" else str(torch.cuda.get_device_properties(device).uuid)


@dataclass(frozen=True)
class IpcHandle:
    """What ``UntypedStorage._share_cuda_`` gives, in its order, without the sender's index of the device."""

    handle: bytes  # of the allocation
    num_bytes: int  # of the storage
    offset_bytes: int  # of the storage in the allocation
    ref_counter_handle: bytes
    ref_counter_offset: int
    event_handle: bytes
    event_sync_required: bool

    @classmethod
    def of(cls, block: Tensor) -> Self:
        """Of a whole storage.

        Args:
            block: [bytes] uint8 on a GPU, alone in its storage; kept by the caller until the receiver is done.
        """
        assert block.device.type == "cuda" and block.storage_offset() == 0
        _, *fields = block.untyped_storage()._share_cuda_()
        return cls(*fields)

    def open(self, device: torch.device) -> Tensor:
        """[bytes] uint8, the sender's memory. Read it, and let go of it before saying so.

        Args:
            device: the GPU that the block is on, by this process' index.
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
        """Bytes become hexadecimal digits."""
        fields = asdict(self)
        return fields | {name: fields[name].hex() for name in _BYTES_FIELDS}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """The reverse of ``to_json``."""
        return cls(**(fields | {name: bytes.fromhex(fields[name]) for name in _BYTES_FIELDS}))

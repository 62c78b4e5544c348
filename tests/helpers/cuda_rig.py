"""A recording ``torch.cuda`` with a virtual clock, for tests of the code for CUDA on a machine without a GPU.

Tensors are host tensors; time and the allocator are emulated. A stream holds the time at which all its queued work is done. A copy takes
its bytes over a rate, a kernel the seconds given to ``VirtualCuda.kernel``; a synchronisation moves the host's clock on. Memory that tensors
release stays with the process until ``empty_cache``, as with torch's allocator: only then another process can use it.

Limits: values do not depend on the order of streams, host threads share one clock, and memory is counted as a sum, without blocks.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hetero_ppo.engines.shared_device import SharedDevice
from megatron_bridge import platform

#: Bytes per virtual second of a copy.
COPY_RATE = 1e6


@dataclass
class VirtualStream:
    """Stand-in for torch.cuda.Stream."""

    cuda: VirtualCuda
    name: str
    busy_until: float = 0.0  # virtual seconds

    def wait_stream(self, other: VirtualStream) -> None:
        self.cuda.waits.append((self.name, other.name))
        self.busy_until = max(self.busy_until, other.busy_until)

    def synchronize(self) -> None:
        self.cuda.now = max(self.cuda.now, self.busy_until)

    def queue(self, seconds: float) -> tuple[float, float]:
        """Queue work. Return its start and end."""
        begin = max(self.busy_until, self.cuda.now)
        self.busy_until = begin + seconds
        return begin, self.busy_until


class VirtualEvent:
    """Stand-in for torch.cuda.Event."""

    def __init__(self, cuda: VirtualCuda) -> None:
        self.cuda = cuda
        self.time = 0.0

    def record(self) -> None:
        self.time = self.cuda.current_stream().busy_until

    def synchronize(self) -> None:
        self.cuda.now = max(self.cuda.now, self.time)


@dataclass
class Copy:
    """A copy that was made on a stream."""

    stream: str
    num_bytes: int
    begin: float  # virtual seconds
    end: float


@dataclass
class VirtualCuda:
    """One device."""

    total: int  # bytes
    now: float = 0.0  # the host's clock, virtual seconds
    allocated: int = 0  # bytes of tensors
    reserved: int = 0  # bytes that this process holds from the driver
    waits: list[tuple[str, str]] = field(default_factory=list)  # (stream that waits, stream that it waits for)
    copies: list[Copy] = field(default_factory=list)
    num_streams: int = 0

    def __post_init__(self) -> None:
        self.default = VirtualStream(self, "default")
        self._thread = threading.local()

    def kernel(self, seconds: float, num_bytes: int = 0) -> tuple[float, float]:
        """Queue a computation on the default stream, with so many bytes of activations. Return its start and end."""
        self.hold(self.allocated + num_bytes)
        self.hold(self.allocated - num_bytes)
        return self.default.queue(seconds)

    def hold(self, num_bytes: int) -> None:
        """Count tensors of so many bytes as allocated."""
        self.allocated = num_bytes
        self.reserved = max(self.reserved, num_bytes)
        assert self.reserved <= self.total, "the process holds more than the device has"

    # --- torch.cuda's functions ---

    def current_stream(self) -> VirtualStream:
        return getattr(self._thread, "stream", self.default)

    @contextlib.contextmanager
    def stream(self, stream: VirtualStream) -> Iterator[None]:
        before, self._thread.stream = self.current_stream(), stream
        yield
        self._thread.stream = before

    def new_stream(self) -> VirtualStream:
        self.num_streams += 1
        return VirtualStream(self, f"stream {self.num_streams}")

    def empty_cache(self) -> None:
        self.reserved = self.allocated

    def mem_get_info(self) -> tuple[int, int]:
        return self.total - self.reserved, self.total

    def cudart(self) -> Any:
        class Runtime:
            cudaHostRegister = staticmethod(lambda *_: 0)
            cudaHostUnregister = staticmethod(lambda *_: 0)

        return Runtime

    @classmethod
    def installed(cls, total: int, patch: pytest.MonkeyPatch) -> VirtualCuda:
        """Make a device of so many bytes, and put it in place of torch.cuda under the residency of roles.

        To be called before a ``SharedDevice`` is made. Barriers of this one process return at once.
        """
        cuda = cls(total)
        cuda._install(patch)
        patch.setattr(dist, "barrier", lambda group: None)
        return cuda

    def _install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(platform, "HAS_CUDA", True)
        patch.setattr(platform, "device", lambda: torch.device("cpu"))
        replaced = {
            "Stream": self.new_stream,
            "Event": lambda: VirtualEvent(self),
            "default_stream": lambda: self.default,
            "current_stream": self.current_stream,
            "current_device": lambda: 0,
            "stream": self.stream,
            "set_device": lambda device: None,
            "empty_cache": self.empty_cache,
            "mem_get_info": self.mem_get_info,
            "memory_allocated": lambda: self.allocated,
            "memory_reserved": lambda: self.reserved,
            "cudart": self.cudart,
        }
        for name, function in replaced.items():
            patch.setattr(torch.cuda, name, function)
        self._record_copies(patch)
        use = SharedDevice._use

        def count(device: SharedDevice, num_bytes: int) -> None:
            use(device, num_bytes)
            self.hold(device._in_use)

        patch.setattr(SharedDevice, "_use", count)

    def _record_copies(self, patch: pytest.MonkeyPatch) -> None:
        copy_ = Tensor.copy_

        def recorded(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
            stream = self.current_stream()
            if stream is not self.default:
                begin, end = stream.queue(source.nbytes / COPY_RATE)
                self.copies.append(Copy(stream.name, source.nbytes, begin, end))
            return copy_(target, source)

        patch.setattr(Tensor, "copy_", recorded)

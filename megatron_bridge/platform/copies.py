"""Copies between device and host memory in parallel with the computation: pinned host memory, and one lane per direction.

A lane is a thread that runs its tasks in order. On CUDA it owns a stream, so the device's copy engines work while kernels run. Without
CUDA both sides of a copy are host memory and the lane's thread copies. The order of events is the same in both cases, so tests on a CPU
cover it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from megatron_bridge import platform

#: Slices of an arena start at multiples of it, so that views of any dtype fit and copies are aligned.
ALIGNMENT = 512


def pinned_host_memory(num_bytes: int) -> Tensor:
    """Allocate [num_bytes] uint8 of host memory, page-locked on CUDA.

    Page-locking uses cudaHostRegister, because torch's own pinned allocator rounds every block up to a power of two.

    Raises:
        RuntimeError: The host memory cannot be page-locked.
    """
    memory = torch.empty(num_bytes, dtype=torch.uint8)
    if platform.HAS_CUDA and num_bytes:
        status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), num_bytes, 0)
        if int(status) != 0:
            raise RuntimeError(
                f"{num_bytes / 2**30:.2f} GiB of host memory cannot be page-locked (cudaHostRegister: {status}); raise the "
                "limit of locked memory (ulimit -l), or set residency.offload=false"
            )
    return memory


def release_pinned(memory: Tensor) -> None:
    """Undo the page lock of ``pinned_host_memory``. Call it before the tensor is released."""
    if platform.HAS_CUDA and memory.numel():
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def allocated_bytes() -> int | None:
    """Return the bytes of tensors on this rank's device, as torch's allocator reports them; None without CUDA."""
    return torch.cuda.memory_allocated() if platform.HAS_CUDA else None


def reserved_bytes() -> int | None:
    """Return the bytes that torch's allocator holds on this rank's device, in use or not; None without CUDA."""
    return torch.cuda.memory_reserved() if platform.HAS_CUDA else None


def release_cached_memory() -> None:
    """Give the memory that torch's allocator caches back to the driver, so that another process can have it. Does nothing on a CPU."""
    if platform.HAS_CUDA:
        torch.cuda.empty_cache()


def describe_device_memory() -> str:
    """Describe for an error message how much of this rank's device is free and how much this process holds; "" on a CPU."""
    if not platform.HAS_CUDA:
        return ""
    free, total = torch.cuda.mem_get_info()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    return (
        f"{free / 2**30:.2f} of {total / 2**30:.2f} GiB are free on device {torch.cuda.current_device()}; this rank holds "
        f"{reserved / 2**30:.2f} GiB, of which tensors take {allocated / 2**30:.2f}"
    )


def computation_done() -> Callable[[], None]:
    """Mark the end of the work that the calling thread has queued on the device. Calling the result waits for it, from any thread."""
    if not platform.HAS_CUDA:
        return _nothing
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


def _nothing() -> None:
    return None


class CopyLane:
    """Copies in one direction, in order, in a thread of their own.

    On CUDA the lane's stream never waits for the computation's stream. What it copies out must be computed already, so such a task first
    waits for ``computation_done``. What it copies in gets memory of the lane's own: torch keeps memory apart by the stream that it was
    allocated on, so no queued kernel reads or writes it, and activations never occupy a part of it.
    """

    def __init__(self, name: str) -> None:
        self._stream = torch.cuda.Stream() if platform.HAS_CUDA else None
        self._device = platform.device()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=self._begin)

    def _begin(self) -> None:
        torch.set_num_threads(1)  # copies must not take cores from the computation
        if platform.HAS_CUDA:
            torch.cuda.set_device(self._device)

    def submit(self, task: Callable[[], None]) -> Future[None]:
        """Queue a task. If it raises, the future's ``result`` raises the same error."""
        return self._threads.submit(task)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Allocate, copy and fill on the lane's stream, inside a task. All of it is done when the body has ended."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copy (target, source) pairs. Call it inside ``at_work``."""
        for target, source in pairs:
            target.copy_(source, non_blocking=self._stream is not None)

    def close(self) -> None:
        """Finish the queued tasks and end the thread."""
        self._threads.shutdown(wait=True)

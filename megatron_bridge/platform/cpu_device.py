"""Stand-in for ``torch.cuda`` inside Megatron-Core on a machine without CUDA.

It has only the names that Megatron-Core uses in this project; any other raises an AttributeError with its name. Streams do nothing,
because CPU work is synchronous. Events keep the wall time, and the random state is the CPU generator's.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform as host
import time
from typing import Any
from collections.abc import Iterator

import torch

_CPU = torch.device("cpu")


#: Parameters of ``mallopt`` in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def cache_freed_memory() -> None:
    """Let this process keep the memory that tensors release, as torch's CUDA allocator does.

    glibc returns large blocks to the system at once and gets them back page by page. When one role leaves and another one comes in, copies
    then run at a third of the rate. Other C libraries are left as they are.
    """
    if host.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    # One heap for all threads, because one thread releases blocks that another takes; blocks of all sizes on it; never trimmed.
    for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)):
        if libc.mallopt(parameter, value) != 1:
            raise RuntimeError(f"mallopt({parameter}, {value}) failed")


class Stream:
    """A stream that does nothing: CPU operations finish before they return."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.priority = priority

    def synchronize(self) -> None:
        return None

    def wait_stream(self, stream: Stream) -> None:
        return None

    def wait_event(self, event: Event) -> None:
        return None

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True


ExternalStream = Stream


class Event:
    """An event that remembers when it was recorded."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self._time = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        return None

    def synchronize(self) -> None:
        return None

    def query(self) -> bool:
        return True

    def elapsed_time(self, end_event: Event) -> float:
        """Return the milliseconds between two recordings."""
        return 1000.0 * (end_event._time - self._time)


_STREAM = Stream()


def current_stream(device: Any = None) -> Stream:
    return _STREAM


def default_stream(device: Any = None) -> Stream:
    return _STREAM


def set_stream(stream: Stream) -> None:
    return None


@contextlib.contextmanager
def stream(stream: Stream | None) -> Iterator[None]:
    yield


def current_device() -> torch.device:
    return _CPU


def set_device(device: Any) -> None:
    return None


def device_count() -> int:
    return 0


def is_available() -> bool:
    return False


def is_current_stream_capturing() -> bool:
    return False


def synchronize(device: Any = None) -> None:
    return None


def empty_cache() -> None:
    return None


def memory_allocated(device: Any = None) -> int:
    return 0


def memory_reserved(device: Any = None) -> int:
    return 0


def max_memory_allocated(device: Any = None) -> int:
    return 0


def memory_stats(device: Any = None) -> dict[str, int]:
    return {}


def get_device_capability(device: Any = None) -> tuple[int, int]:
    return (0, 0)


def manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def initial_seed() -> int:
    return torch.default_generator.initial_seed()


def get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(new_state)


default_generators = (torch.default_generator,)


class random:
    """Stand-in for ``torch.cuda.random``."""

    get_rng_state = staticmethod(get_rng_state)
    set_rng_state = staticmethod(set_rng_state)


class nvtx:
    """Stand-in for ``torch.cuda.nvtx``: ranges for a profiler that is not there."""

    @staticmethod
    def range_push(message: str) -> None:
        return None

    @staticmethod
    def range_pop() -> None:
        return None

    @staticmethod
    @contextlib.contextmanager
    def range(message: str) -> Iterator[None]:
        yield


class amp:
    """Stand-in for ``torch.cuda.amp``: the decorators of autograd functions."""

    custom_fwd = staticmethod(torch.cuda.amp.custom_fwd)
    custom_bwd = staticmethod(torch.cuda.amp.custom_bwd)


#: Classes in annotations, isinstance checks and default arguments of modules that a CPU run imports. It never builds one.
CUDAGraph = torch.cuda.CUDAGraph
MemPool = torch.cuda.MemPool
OutOfMemoryError = torch.cuda.OutOfMemoryError
graph = torch.cuda.graph

#: Legacy tensor types, for isinstance checks.
FloatTensor = torch.FloatTensor
HalfTensor = torch.HalfTensor
BFloat16Tensor = torch.BFloat16Tensor

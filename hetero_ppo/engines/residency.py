"""The storages of a role, which are on the device or in pinned host buffers that were allocated once.

A role's storages (``Kind``: parameters, gradient buffers, fp32 main parameters, moments) are released in place with
``storage.resize_(0)`` and come back at the same tensor objects, so that Megatron-Core's views into its buffers, its
optimizer and autograd's hooks never notice. Gradients are not copied: they are released, and come back as zeros.
``SharedDevice`` decides when a block moves; this module knows how.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hetero_ppo.step.kinds import Kind
from megatron_bridge.platform.copies import ALIGNMENT, CopyLane, pinned_host_memory, release_pinned


class ResidencyError(RuntimeError):
    """A role was used while its bytes were not on the device, or turns were nested. This is a bug of this package or of a plugin."""


#: Attributes and methods of a parameter that stay usable while its memory is released. None of them reads or writes the memory.
_METADATA = frozenset(
    {
        *(
            getattr(Tensor, name).__get__
            for name in ("shape", "dtype", "device", "requires_grad", "is_leaf", "ndim", "grad")
        ),
        *(getattr(Tensor, name).__get__ for name in ("layout", "is_cuda", "is_sparse", "is_meta", "grad_fn")),
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.element_size, Tensor.__hash__),
        *(Tensor.is_floating_point, Tensor.is_complex, Tensor.type, Tensor.storage_offset, Tensor.is_contiguous),
    }
)


class OffloadedParameter(torch.nn.Parameter):
    """Class of a parameter whose memory is released. It raises an error where torch would read freed memory and end the process."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        for argument in (*args, *kwargs.values()):
            for one in argument if isinstance(argument, (list, tuple)) else (argument,):
                if isinstance(one, OffloadedParameter):
                    residency: RoleResidency = one.__dict__["_residency"]
                    raise residency.error(
                        f"{getattr(func, '__name__', func)} touches a parameter that is in host memory"
                    )
        raise AssertionError("called without an offloaded parameter")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # mypy reads torch's own as another
        return f"OffloadedParameter(shape={tuple(self.shape)}, dtype={self.dtype})"


@dataclass(eq=False)
class Block:
    """One storage of a role."""

    kind: Kind
    storage: torch.UntypedStorage
    num_bytes: int
    host: Tensor | None = None  # [num_bytes] uint8 of the role's arena; None for gradients
    is_dirty: bool = True  # the device's bytes are newer than the host's
    is_target: bool = True  # whether it is to be on the device; the copy lanes bring it there or to the host
    arriving: bool = False  # its device memory is accounted for, and its bytes are being copied there
    moving: Future[None] | None = None  # the last move that was queued

    def __post_init__(self) -> None:
        # Created once: the view stays valid when the storage's memory is released and allocated again.
        self._view = torch.empty(0, dtype=torch.uint8, device=self.storage.device).set_(self.storage)

    @property
    def on_device(self) -> bool:
        """True when the block has memory on the device. Its bytes may still be being copied there."""
        return self.storage.nbytes() > 0

    def device_view(self) -> Tensor:
        """Return the block's memory on the device as [num_bytes] uint8. It is valid while ``on_device`` is true."""
        return self._view


class RoleResidency:
    """The storages of one role."""

    def __init__(
        self,
        role: str,
        tensors: Mapping[Kind, list[Tensor]],
        parameters: list[torch.nn.Parameter],
        leave: Callable[[], None],
    ) -> None:
        """Args:
        role: Name of the role in messages.
        tensors: Every tensor of each kind, views and aliases too. Tensors of one storage belong to the first kind.
        parameters: Parameters of the model; the use of one in host memory is an error.
        leave: Function that finishes pending work of Megatron-Core. It is called at the end of a turn, before anything moves.
        """
        self.role = role
        self.leave = leave
        self.phase = "start"  # of its last turn, for messages
        self.parameters = parameters
        self._classes = {id(p): type(p) for p in parameters}
        self._tensors = [tensor for kind in Kind for tensor in tensors.get(kind, [])]
        self.blocks: list[Block] = []
        self._block_of: dict[int, Block] = {}  # storage -> block
        self._arenas: list[Tensor] = []
        for kind in Kind:
            for tensor in tensors.get(kind, []):
                storage = tensor.untyped_storage()
                if storage.nbytes() and storage._cdata not in self._block_of:
                    block = Block(kind, storage, storage.nbytes())
                    self._block_of[storage._cdata] = block
                    self.blocks.append(block)

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds that this role has any bytes of."""
        return frozenset(block.kind for block in self.blocks)

    def num_bytes(self, kinds: frozenset[Kind]) -> int:
        """Return the bytes of these kinds, on the device or not."""
        return sum(block.num_bytes for block in self.blocks if block.kind in kinds)

    def bytes_by_kind(self) -> tuple[dict[Kind, int], dict[Kind, int]]:
        """Return the present bytes (on the device, in host buffers). A host buffer stays when its bytes are on the device."""
        device = {kind: 0 for kind in Kind if kind in self.kinds}
        host = dict(device)
        for block in self.blocks:
            device[block.kind] += block.storage.nbytes()
            host[block.kind] += 0 if block.host is None else block.num_bytes
        return device, host

    def error(self, what: str) -> ResidencyError:
        """Return an error that names role and phase."""
        return ResidencyError(
            f"{self.role}: {what}; its last turn was phase {self.phase!r}. Use it inside 'with engine.on_device(...)'"
        )

    def mark_changed(self, kinds: frozenset[Kind]) -> None:
        """Note that the device's bytes of these kinds are newer than the host's."""
        for block in self.blocks:
            block.is_dirty = block.is_dirty or block.kind in kinds

    # --- moves of blocks, called from the threads of the lanes ---

    def move_out(self, blocks: Sequence[Block], lane: CopyLane) -> int:
        """Copy blocks to the host where the host's copy is old, and release their memory. Returns the bytes copied."""
        old = [block for block in blocks if block.host is not None and block.is_dirty]
        with lane.at_work():
            lane.copy([(block.host, block.device_view()) for block in old if block.host is not None])
        for block in old:
            block.is_dirty = False
        for block in blocks:
            block.storage.resize_(0)
        return sum(block.num_bytes for block in old)

    def move_in(self, blocks: Sequence[Block], lane: CopyLane) -> int:
        """Allocate the blocks' memory and fill it, gradients with zeros. Returns the bytes copied."""
        pairs = []
        with lane.at_work():
            for block in blocks:
                block.storage.resize_(block.num_bytes)
                if block.host is None:
                    block.device_view().zero_()
                else:
                    pairs.append((block.device_view(), block.host))
            lane.copy(pairs)
        return sum(source.numel() for _, source in pairs)

    def pin(self) -> None:
        """Allocate host buffers for every block that is copied: one arena for each kind, once."""
        for kind in Kind:
            blocks = [b for b in self.blocks if b.kind is kind and b.host is None and kind is not Kind.grads]
            if not blocks:
                continue
            arena = pinned_host_memory(sum(_aligned(b.num_bytes) for b in blocks))
            self._arenas.append(arena)
            start = 0
            for block in blocks:
                block.host = arena[start : start + block.num_bytes]
                start += _aligned(block.num_bytes)

    def unpin(self) -> None:
        """Give the host buffers back."""
        for arena in self._arenas:
            release_pinned(arena)
        self._arenas.clear()

    # --- guards ---

    def guard(self) -> None:
        """Make every use of a parameter an error that names the role, instead of a crash."""
        for parameter in self.parameters:
            parameter.__dict__["_residency"] = self
            parameter.__class__ = OffloadedParameter

    def unguard(self) -> None:
        """Make the parameters ordinary again."""
        for parameter in self.parameters:
            parameter.__class__ = self._classes[id(parameter)]

    @contextlib.contextmanager
    def on_host(self) -> Iterator[None]:
        """Replace the data of every released tensor by its host buffer, so that a checkpoint is written from there. Gradients stay out."""
        before: list[tuple[Tensor, Tensor]] = []
        self.unguard()
        try:
            for tensor in self._tensors:
                block = self._block_of.get(tensor.untyped_storage()._cdata)
                if block is None or block.on_device or block.kind is Kind.grads:
                    continue
                assert block.host is not None
                before.append((tensor, tensor.data))
                tensor.data = _view_of_host(tensor, block.host)
            yield
        finally:
            for tensor, data in before:
                tensor.data = data
            if any(not block.on_device for block in self.blocks if block.kind is Kind.params):
                self.guard()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _view_of_host(tensor: Tensor, host: Tensor) -> Tensor:
    """Return the part of a host buffer that holds ``tensor``, in its dtype and shape."""
    size = tensor.element_size()
    start = host.storage_offset() // size + tensor.storage_offset()
    view = torch.empty(0, dtype=tensor.dtype)
    return view.set_(host.untyped_storage(), start, tensor.shape, tensor.stride())

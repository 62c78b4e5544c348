"""State of distributed optimizers in a checkpoint: every rank describes the slices that it keeps, and nothing is gathered.

The distributed optimizer (ZeRO-1) gives a rank one contiguous part of every bucket, so of each parameter in it the elements
[start, end) in row-major order. Megatron-Core 0.16.1 can't describe such a part of a tensor (it refuses ``flattened_range``); its
``fully_reshardable`` format gathers all parts on all ranks instead. But elements [start, end) of a row-major tensor are a few boxes,
for a matrix the end of one row, whole rows, and the beginning of another:

    . . . # #        box [0:1, 3:5]
    # # # # #        box [1:3, 0:5]
    # # # # #
    # . . . .        box [3:4, 0:1]

Each box is a ``ShardedTensor`` of the parameter's global fp32 tensor. Boxes are views of the optimizer's own tensors, so a save reads
them where they are and a load writes into them. A rank of any other layout reads the boxes that its own ones meet.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

#: Prefix of the tensors' names in a checkpoint.
SLICES = "optimizer.slices."
#: That of ``fully_reshardable``, which older versions wrote. The global tensors are the same, if it was written right.
GATHERED = "optimizer.state."
#: Tensors of a parameter: main parameter and moments.
STATES = {"param", "exp_avg", "exp_avg_sq"}
#: Entries that ``fully_reshardable`` leaves beside ``state_dict()``.
_OF_GATHERED = {"param_state", "param_state_sharding_type"}


def is_gathered(names: Collection[str]) -> bool:
    """Return whether an older version wrote these tensors of a role, gathering the state of a distributed optimizer."""
    return any(name.startswith(f"{GATHERED}param.") for name in names)


def is_distributed(names: Collection[str]) -> bool:
    """Return whether these tensors of a role hold the state of a distributed optimizer."""
    return is_gathered(names) or any(name.startswith(SLICES) for name in names)


class OptimizerSlices:
    """This rank's part of the state of a role's optimizers, for one save or one load. The constructor is not collective."""

    def __init__(
        self,
        optimizers: Sequence[DistributedOptimizer],
        weights: Mapping[str, Any],
        world: dist.ProcessGroup,
        *,
        gathered: bool = False,
    ) -> None:
        """Describe the state.

        Args:
            optimizers: Optimizers of one class of parameters each (dense, expert), with their state.
            weights: Sharded state dict of the model's chunks, which says where each parameter lies in the global model.
            world: Group of all ranks.
            gathered: Whether to load what an older version wrote (``GATHERED``).
        """
        self._world = world
        self._gathered = gathered
        self._main_params: list[
            tuple[torch.nn.Parameter, int, Tensor]
        ] = []  # (parameter, first element, its main parameter)
        places = {
            entry.data: entry
            for entry in nested_values(weights)
            if isinstance(entry, (ShardedTensor, ShardedTensorFactory))
        }
        states = [{**one.state_dict(), "slices": self._slices(one, places)} for one in optimizers]
        #: ``state_dict()``, which is the same on all ranks, and under "slices" number -> ShardedTensor; of several optimizers by index.
        self.state: dict[Any, Any] = states[0] if len(states) == 1 else dict(enumerate(states))

    def take(self, loaded: dict[Any, Any], folder: Path) -> dict[Any, Any]:
        """Return what ``MegatronOptimizer.load_state_dict`` is to take, once the slices have been read into the optimizers' tensors.
        Collective over the world.

        Args:
            loaded: Result of dist_checkpointing for ``state``, after the weights have been loaded.
            folder: Folder of the role, for messages.

        Raises:
            ValueError: An older version mixed the parameters' states up.
        """
        if self._gathered:
            self._check_main_params(folder)
        if "slices" in self.state:
            return _rest(loaded, self.state)
        return {index: _rest(loaded[index], asked) for index, asked in self.state.items()}

    def _slices(self, optimizer: DistributedOptimizer, places: Mapping[Tensor, Any]) -> dict[str, ShardedTensor]:
        slices: dict[str, ShardedTensor] = {}
        prefix = GATHERED if self._gathered else SLICES
        for parameter, start, end in _kept_ranges(optimizer):
            entry = places[parameter]
            # As many ranks hold a slice as hold the parameter, data-parallel ones aside: each of those has a slice of its own.
            replica_id = (*entry.replica_id[:2], optimizer.distributed_optimizer_instance_id)
            tensors = optimizer._get_main_param_and_optimizer_states(parameter)
            if parameter.dtype is torch.float32:  # its main parameter is a view of it, and it is among the weights
                del tensors["param"]
                if self._gathered:
                    tensors["param"] = torch.empty_like(tensors["exp_avg"])
            if "param" in tensors:
                self._main_params.append((parameter, start, tensors["param"]))
            for state in sorted(STATES & tensors.keys()):
                flat = tensors[state].detach()
                assert flat.shape == (end - start,) and flat.is_contiguous()
                for first, piece in _pieces(entry, parameter.shape):
                    for box in _cut(piece, flat, start - first, f"{prefix}{state}.{piece.key}", replica_id):
                        slices[str(len(slices))] = box
        return slices

    def _check_main_params(self, folder: Path) -> None:
        """Compare with the weights, which are the main parameters' rounded values, on all ranks."""
        bad = False
        for parameter, start, main_param in self._main_params:
            part = parameter.detach().view(-1)[start : start + len(main_param)]
            bad = bad or not torch.equal(main_param.detach().to(parameter.dtype), part)
        worst = torch.tensor([int(bad)])
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=self._world)
        if bool(worst):
            raise ValueError(
                f"checkpoint {folder} holds main parameters that are not those of its weights: an older version wrote it with "
                "ddp.overlap_grad_reduce, and Megatron-Core 0.16.1 then mixes the optimizer states of several buckets up. The "
                "weights are right: start a new run from them, which 'hetero-ppo export' gives"
            )


def _rest(loaded: dict[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return all but the slices of one optimizer's state."""
    found = loaded.get("slices", {})
    assert found.keys() == asked["slices"].keys(), "not the slices that were asked for"
    for name, box in asked["slices"].items():
        assert found[name].data_ptr() == box.data.data_ptr(), f"{box.key} was read into a copy"
    return {name: value for name, value in loaded.items() if name != "slices" and name not in _OF_GATHERED}


def boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut elements [start, end) of a row-major tensor into boxes, in their order. An n-d tensor gives 2 n - 1 at most.

    Args:
        shape: Shape of the tensor, of one dimension or more.
        start: First element.
        end: Element after the last.

    Yields:
        Offsets and sizes of a box, of as many dimensions as the tensor.
    """
    if len(shape) == 1:
        yield (start,), (end - start,)
        return
    row = math.prod(shape[1:])
    while start < end:
        index, inside = divmod(start, row)
        num_rows = (end - start) // row
        if inside or not num_rows:
            stop = min(end, (index + 1) * row)
            for offsets, sizes in boxes(shape[1:], inside, stop - index * row):
                yield (index, *offsets), (1, *sizes)
        else:
            stop = start + num_rows * row
            yield (index, *(0 for _ in shape[1:])), (num_rows, *shape[1:])
        start = stop


def _kept_ranges(optimizer: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """Yield (parameter, first element, element after the last) of all that this rank keeps the state of."""
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _pieces(entry: ShardedTensor | ShardedTensorFactory, shape: torch.Size) -> list[tuple[int, ShardedTensor]]:
    """Return (first element, place in the global model) of the parts of a parameter: gate and up of an MLP are two, others one."""
    if isinstance(entry, ShardedTensor):
        return [(0, entry)]
    # A tensor without memory shows which elements the factory takes for which part.
    pieces = list(nested_values([entry.build_fn(entry.key, torch.empty(shape, device="meta"), entry.replica_id, None)]))
    for piece in pieces:
        assert piece.data.is_contiguous(), f"{piece.key} is not a range of its parameter"
    assert sum(piece.data.numel() for piece in pieces) == shape.numel()
    return [(piece.data.storage_offset(), piece) for piece in pieces]


def _cut(
    piece: ShardedTensor, flat: Tensor, start: int, key: str, replica_id: tuple[int, ...]
) -> Iterator[ShardedTensor]:
    """Cut what ``flat`` has of a piece into boxes.

    Args:
        piece: Place of the piece in the global model.
        flat: [n] state.
        start: Element of the piece that ``flat`` begins with; negative where it begins before the piece.
        key: Name of the global tensor.
        replica_id: Which of the ranks that have the same slice this one is.
    """
    low, high = max(start, 0), min(start + len(flat), math.prod(piece.local_shape))
    position, before = low - start, piece.prepend_axis_num  # axes of layers and of experts
    for offsets, sizes in boxes(piece.local_shape, low, high) if low < high else ():
        numel, sizes = math.prod(sizes), (*(1 for _ in range(before)), *sizes)
        place = zip(piece.global_offset, (*(0 for _ in range(before)), *offsets), strict=True)
        yield ShardedTensor(
            key,
            flat[position : position + numel].view(sizes),
            flat.dtype,
            sizes,
            tuple(piece.global_shape),
            tuple(first + offset for first, offset in place),
            axis_fragmentations=None,  # boxes are of unequal sizes
            replica_id=replica_id,
            allow_shape_mismatch=piece.allow_shape_mismatch,
        )
        position += numel

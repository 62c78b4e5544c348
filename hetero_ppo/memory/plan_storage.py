"""Bytes of a role on one rank, by kind: what Megatron-Core's DDP buffers and optimizers hold for a layout, to the byte.

The gradient buffer of a model chunk is one fp32 tensor. With the distributed optimizer (ZeRO-1, Rajbhandari et al. 2020) the
parameters lie in a buffer of the same layout: every parameter starts at a multiple of 64 elements, every bucket ends at a
multiple of lcm(ranks, 128), and each of the ranks keeps fp32 main parameters and moments of its part of every bucket, without
the padding (megatron.core.distributed.param_and_grad_buffer, megatron.core.optimizer.distrib_optimizer).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from hetero_ppo.config.derived import data_parallel_size
from hetero_ppo.config.devices import dtype_of, with_dtype
from hetero_ppo.config.schema import Dtype, RoleConfig
from hetero_ppo.step.kinds import Kind
from hetero_ppo.step.roles import role_spec
from megatron_bridge.model.config_mapping import BridgeConfig, bridge_config, read_hf_config
from megatron_bridge.weights.parameter_count import LocalParameter, local_parameters

FP32_BYTES = 4
DTYPES = {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16}

# Megatron-Core's alignment, in elements.
_PARAMETER_START = 64
_BUCKET_END = 128


@dataclass(frozen=True)
class Place:
    """Place of a rank in a role's layout."""

    pp_rank: int
    shard_rank: int  # among the data- and context-parallel ranks, over which the distributed optimizer shards
    expert_shard_rank: int  # the same among the replicas of this rank's experts


@dataclass(frozen=True)
class BufferLayout:
    """One of DDP's buffers: positions in elements."""

    numel: int  # with padding
    spans: tuple[tuple[int, int], ...]  # (start, end) of every parameter, ascending
    buckets: tuple[tuple[int, int], ...]  # (start, end) of every bucket, padding included

    def shard_numel(self, rank: int, size: int) -> int:
        """Return the elements of parameters, without padding, in the parts of all buckets that one of ``size`` ranks keeps."""
        total, first = 0, 0
        for start, end in self.buckets:
            part = (end - start) // size
            low, high = start + rank * part, start + (rank + 1) * part
            while first < len(self.spans) and self.spans[first][1] <= low:
                first += 1
            position = first
            while position < len(self.spans) and self.spans[position][0] < high:
                total += min(self.spans[position][1], high) - max(self.spans[position][0], low)
                position += 1
        return total


def buffer_layout(
    parameters: Sequence[LocalParameter], *, distributed: bool, num_shards: int, bucket_size: int | None
) -> BufferLayout:
    """Return the layout of a chunk's parameters, the last one first, as the backward pass reaches them.

    Args:
        parameters: Parameters of the chunk, in the order of ``named_parameters``.
        distributed: Whether the layout has the padding of the distributed optimizer.
        num_shards: Number of data- times context-parallel ranks.
        bucket_size: Number of elements from which on a bucket is full; None: one bucket.
    """
    spans: list[tuple[int, int]] = []
    buckets: list[tuple[int, int]] = []
    bucket_start = end = 0

    def close_bucket() -> None:
        nonlocal bucket_start, end
        end = _padded(end, math.lcm(num_shards, _BUCKET_END)) if distributed else end
        buckets.append((bucket_start, end))
        bucket_start = end

    for parameter in reversed(parameters):
        # Tied embeddings get a bucket of their own, so that both stages shard them alike.
        alone = parameter.shared_embedding and distributed
        start = _padded(end, _PARAMETER_START) if distributed else end
        if alone and start > bucket_start:
            end = start
            close_bucket()
            start = end
        end = start + parameter.numel
        spans.append((start, end))
        if alone or (bucket_size is not None and end - bucket_start >= bucket_size):
            close_bucket()
    if end > bucket_start:
        close_bucket()
    return BufferLayout(end, tuple(spans), tuple(buckets))


def _padded(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class RoleStorage:
    """A role in its layout over the ranks of a run; nothing is built."""

    def __init__(self, name: str, config: RoleConfig, world_size: int, *, on_cpu: bool = True) -> None:
        """Read config.json of a role's model.

        Args:
            name: Path of its section, such as "actor" or "reward_models.0".
            config: The section; of its ``model.path`` only config.json is read.
            world_size: Number of ranks of the run.
            on_cpu: Whether the run computes on CPUs; the plan may be made on another machine.

        Raises:
            ValueError: There is no such file, the model or layout is not supported, or the layout does not divide the world.
        """
        self.spec = role_spec(name, with_dtype(config, on_cuda=not on_cpu))
        self.name, self.head, self.config = name, self.spec.head, self.spec.config
        config = self.config
        self.bridge: BridgeConfig = bridge_config(
            read_hf_config(config.model.path),
            dtype=DTYPES[dtype_of(config.model)],
            recompute=self.spec.trained_config.recompute if self.spec.is_trained else None,
            aligned=config.aligned,
            on_cuda=not on_cpu,
            **vars(config.parallel),
        )
        self.dp_size = data_parallel_size(name, config.parallel, world_size)
        self.num_shards = self.dp_size * config.parallel.context
        self.num_expert_shards = config.parallel.tensor * self.num_shards // config.parallel.expert
        self._bytes: dict[Place, dict[Kind, int]] = {}

    @property
    def element_bytes(self) -> int:
        """Bytes of a parameter."""
        return self.bridge.transformer.params_dtype.itemsize

    @cached_property
    def parameters(self) -> list[list[list[LocalParameter]]]:
        """[pipeline stage][model chunk][parameter] of a rank."""
        return [local_parameters(self.bridge, self.head, stage) for stage in range(self.config.parallel.pipeline)]

    def place(self, rank: int) -> Place:
        """Rank order is tp fastest, then cp, dp, pp, as ``distributed.groups.role_groups`` builds it; for experts ep, then dp."""
        parallel = self.config.parallel
        pp_rank, in_stage = divmod(rank, parallel.tensor * self.num_shards)
        return Place(pp_rank, in_stage // parallel.tensor, in_stage // parallel.expert)

    def bytes_by_kind(self, rank: int) -> dict[Kind, int]:
        """Return the bytes of a rank after an optimizer step, without offloading; kinds of 0 bytes are left out."""
        place = self.place(rank)
        if place not in self._bytes:
            self._bytes[place] = {kind: size for kind, size in self._count(place).items() if size}
        return self._bytes[place]

    def checkpoint_bytes(self, rank: int) -> int:
        """Return the bytes that a rank writes of a checkpoint of a trained role: of equal copies, the first rank writes its own."""
        place, optimizer = self.place(rank), self.spec.trained_config.optimizer
        total = 0
        for chunk in self.parameters[place.pp_rank]:
            for parameter in chunk:
                if (place.expert_shard_rank if parameter.expert else place.shard_rank) == 0:
                    total += parameter.numel * self.element_bytes
                    total += 0 if optimizer.distributed else parameter.numel * self._optimizer_bytes
        if optimizer.distributed:
            # Every rank writes its own slices (``engines/optimizer_slices.py``).
            sizes = self.bytes_by_kind(rank)
            total += sizes.get(Kind.main_params, 0) + sizes.get(Kind.moments, 0)
        return total

    def loading_bytes(self, rank: int) -> int:
        """Return an upper bound of what a rank holds besides its own tensors while it loads a checkpoint of a trained role.

        That is one tensor of the files at a time: a parameter, or its state, of which a distributed optimizer's files have slices.
        """
        largest = max(parameter.numel for chunk in self.parameters[self.place(rank).pp_rank] for parameter in chunk)
        kept = self.bytes_by_kind(rank).get(Kind.moments, 0) // (2 * FP32_BYTES)
        return max(largest * self.element_bytes, min(largest, kept) * FP32_BYTES)

    @property
    def _optimizer_bytes(self) -> int:
        """Bytes of optimizer state for one element: two moments, and a main parameter if the parameter itself is not fp32."""
        return 2 * FP32_BYTES + (FP32_BYTES if self.element_bytes < FP32_BYTES else 0)

    def _count(self, place: Place) -> dict[Kind, int]:
        chunks = self.parameters[place.pp_rank]
        numel = sum(parameter.numel for chunk in chunks for parameter in chunk)
        if not self.spec.is_trained:
            return {Kind.params: numel * self.element_bytes}
        buffers = [buffer for index, chunk in enumerate(chunks) for buffer in self._buffers(place, index, chunk)]
        buffer_numel = sum(layout.numel for layout, _, _ in buffers)
        held, updated = numel, numel
        if self.spec.trained_config.optimizer.distributed:
            held = buffer_numel
            updated = sum(layout.shard_numel(rank, size) for layout, rank, size in buffers)
        return {
            Kind.params: held * self.element_bytes,
            Kind.grads: buffer_numel * FP32_BYTES,
            Kind.main_params: updated * FP32_BYTES if self.element_bytes < FP32_BYTES else 0,
            Kind.moments: 2 * updated * FP32_BYTES,
        }

    def _buffers(
        self, place: Place, index: int, chunk: Sequence[LocalParameter]
    ) -> Iterator[tuple[BufferLayout, int, int]]:
        """Yield (layout, this rank's shard, number of shards) of DDP's buffers of a chunk; experts have their own buffer."""
        dense = [parameter for parameter in chunk if not parameter.expert]
        experts = [parameter for parameter in chunk if parameter.expert]
        for parameters, rank, size in (
            (dense, place.shard_rank, self.num_shards),
            (experts, place.expert_shard_rank, self.num_expert_shards),
        ):
            layout = buffer_layout(
                parameters,
                distributed=self.spec.trained_config.optimizer.distributed,
                num_shards=size,
                bucket_size=self._bucket_size(place.pp_rank, index),
            )
            yield layout, rank, size

    def _bucket_size(self, pp_rank: int, chunk: int) -> int | None:
        """Return the size of DDP's buckets: it cuts only the first chunk of the first stage, to overlap its reduction."""
        ddp = self.spec.trained_config.ddp
        if not ddp.overlap_grad_reduce or pp_rank > 0 or chunk > 0:
            return None
        return ddp.bucket_size or max(40_000_000, 1_000_000 * self.dp_size)

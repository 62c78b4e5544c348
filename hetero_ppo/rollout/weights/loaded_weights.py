"""Checks, inside vLLM's worker process, that vLLM's own parameters hold what was sent.

vLLM joins tensors (query, key and value into one, gate and up into one, all experts of a layer into two), gives every
tensor-parallel rank a part, pads the vocabulary, and on a CPU packs linear layers into a kernel's private layout. This module cuts its
parameters back into the checkpoint's tensors, and compares the checksum of each with the one that was sent, by name. Layers that pack
their weights (linear layers on a CPU, experts anywhere) are read after the loader has filled them and before they are packed. The probe
prompt checks what the kernel then computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hetero_ppo.rollout.weights.tensor_bytes import host_checksum

EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
NUM_HASH_THREADS = 4  # hashing releases the GIL


def part_of(full: Tensor, shape: Sequence[int], rank: int, size: int, *, padded: bool) -> Tensor:
    """Return the part of a checkpoint's tensor that a tensor-parallel rank holds.

    Args:
        full: Tensor of the checkpoint.
        shape: Shape of what the rank holds.
        rank: Tensor-parallel rank.
        size: Number of tensor-parallel ranks.
        padded: Whether rows beyond the checkpoint's are padding (a vocabulary), so that the last ranks may hold fewer. Otherwise
            ranks beyond the number of parts hold copies (key and value heads, of which there may be fewer than ranks).
    """
    part = full
    for dim, (rows, held) in enumerate(zip(full.shape, shape, strict=True)):
        if held != rows or (padded and dim == 0):
            index = rank if padded and dim == 0 else rank * (rows // held) // size
            start = min(index * held, rows)
            part = part.narrow(dim, start, min(held, rows - start))
    return part


def dense_pieces(prefix: str, layer: nn.Module, packed: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
    """Return views of a layer's parameters by their names in a checkpoint, for all parameters that can be read.

    Args:
        prefix: Name of the layer in the model.
        layer: Layer without routed experts. Parameters that a kernel has taken away are empty and are left out.
        packed: Name of a fused layer -> names of its parts, in order.
    """
    parent, _, leaf = prefix.rpartition(".")
    pieces: dict[str, Tensor] = {}
    for name, parameter in layer.named_parameters(recurse=False):
        if parameter.numel() == 0:
            continue
        if leaf in packed:
            sizes: Any = layer.output_partition_sizes  # vLLM's; nn.Module types every attribute as a tensor or a module
            views = parameter.data.split(list(sizes))
            pieces |= {f"{parent}.{part}.{name}": view for part, view in zip(packed[leaf], views, strict=True)}
        else:
            pieces[f"{prefix}.{name}"] = parameter.data
    return pieces


def expert_pieces(prefix: str, layer: nn.Module) -> dict[str, Tensor]:
    """Return the same for a layer of routed experts: w13_weight [E, 2 * I, H], w2_weight [E, H, I]."""
    experts = prefix[: prefix.index(".experts") + len(".experts")]
    w13, w2 = layer.get_parameter("w13_weight").data, layer.get_parameter("w2_weight").data
    gates, ups = w13.chunk(2, dim=1)
    tensors = dict(zip(EXPERT_PROJECTIONS, (gates, ups, w2), strict=True))
    return {
        f"{experts}.{expert}.{projection}.weight": tensor[expert]
        for projection, tensor in tensors.items()
        for expert in range(tensor.shape[0])
    }


def compare_pieces(
    pieces: Mapping[str, Tensor],
    staged: Mapping[str, Tensor],
    checksums: Mapping[str, str],
    *,
    rank: int = 0,
    size: int = 1,
    padded: bool = False,
    checksum: Callable[[Tensor], str] = host_checksum,
) -> dict[str, bool]:
    """Return for every piece that was sent whether its checksum differs from that of the tensor that was sent, by name.

    Args:
        pieces: Tensors that vLLM holds, by checkpoint name.
        staged: Tensors that were sent, by checkpoint name.
        checksums: Checksums of the whole tensors that were sent.
        rank: Tensor-parallel rank.
        size: Number of tensor-parallel ranks.
        padded: Whether rows may be padding, see :func:`part_of`.
        checksum: Function that computed ``checksums``.
    """

    def differs(name: str) -> bool:
        held, full = pieces[name], staged[name]
        part = part_of(full, held.shape, rank, size, padded=padded)
        expected = checksums[name] if part.shape == full.shape else checksum(part)
        unpadded = held[tuple(slice(length) for length in part.shape)]
        return checksum(unpadded.to(full.dtype)) != expected

    names = [name for name in pieces if name in staged]
    with ThreadPoolExecutor(max_workers=NUM_HASH_THREADS) as pool:
        return dict(zip(names, pool.map(differs, names), strict=True))


@dataclass
class LoadedWeights:
    """Compares a model's parameters with what was sent, during and after a load.

    Args:
        model: vLLM's model.
        staged: Tensors that were sent, by checkpoint name.
        checksums: Checksums of the tensors that were sent.
        rank: Tensor-parallel rank.
        size: Number of tensor-parallel ranks.
        cpu: Whether linear layers are packed, so that they must be read before that.
        checksum: Function that computed ``checksums``.
    """

    model: nn.Module
    staged: Mapping[str, Tensor]
    checksums: Mapping[str, str]
    rank: int
    size: int
    cpu: bool
    checksum: Callable[[Tensor], str] = host_checksum
    differs: dict[str, bool] = field(default_factory=dict)  # name -> whether it differs, for what has been read
    seconds: float = 0.0  # time for reading and checksums

    @property
    def wrong(self) -> list[str]:
        """Names of tensors that vLLM does not hold as they were sent."""
        return sorted(name for name, differs in self.differs.items() if differs)

    @property
    def unread(self) -> list[str]:
        """Names of tensors that were sent and were found in no parameter."""
        return sorted(self.staged.keys() - self.differs.keys())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Read every layer that packs its weights after it is loaded and before it is packed. On leaving, read all other layers."""
        layers = [(name, layer) for name, layer in self.model.named_modules() if self._packs(layer)]
        wrapped = {id(layer.quant_method): layer.quant_method for _, layer in layers}
        names = {id(layer): name for name, layer in layers}
        for method in wrapped.values():
            method.process_weights_after_loading = self._reading(method.process_weights_after_loading, names)
        try:
            yield
        finally:
            for method in wrapped.values():
                del method.process_weights_after_loading  # removes the instance's wrapper; the class has its own method
        for name, layer in self.model.named_modules():
            if id(layer) not in names:
                self._read(name, layer)

    def _packs(self, layer: nn.Module) -> bool:
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase

        return isinstance(layer, RoutedExperts) or (self.cpu and isinstance(layer, LinearBase))

    def _reading(self, pack: Callable[[nn.Module], None], names: Mapping[int, str]) -> Callable[[nn.Module], None]:
        def read_and_pack(layer: nn.Module) -> None:
            if id(layer) in names:
                self._read(names[id(layer)], layer)
            pack(layer)

        return read_and_pack

    def _read(self, name: str, layer: nn.Module) -> None:
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        start = time.perf_counter()
        if isinstance(layer, RoutedExperts):
            pieces = expert_pieces(name, layer)
        else:
            packed: Any = self.model.packed_modules_mapping  # vLLM's, as above
            pieces = dense_pieces(name, layer, packed)
        padded = isinstance(layer, VocabParallelEmbedding)
        self.differs |= compare_pieces(
            pieces, self.staged, self.checksums, rank=self.rank, size=self.size, padded=padded, checksum=self.checksum
        )
        self.seconds += time.perf_counter() - start

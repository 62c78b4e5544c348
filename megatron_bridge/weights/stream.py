"""Stream the whole Hugging Face tensors of a distributed model, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bridge import platform

# isort: split
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_bridge.families.param_mapping import merge
from megatron_bridge.model.config_mapping import BridgeConfig
from megatron_bridge.weights.weight_plan import chunk_parameters, exported_entries, parameter_of


def stream_hf(
    model_chunks: list[GPTModel], bridge: BridgeConfig, groups: ProcessGroupCollection, *, head: str = "lm"
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, full tensor) for every Hugging Face tensor, in state-dict order, on every rank.

    Collective over groups.tp, groups.ep and groups.pp: all their ranks must run the generator to its end together. It holds at most one whole
    Megatron parameter. The tensors are on the model's device, in the parameters' dtype, and may be views of live parameters: read or copy each
    one before the next step, and don't write to it.

    Raises:
        ValueError: The head is unknown, or chunks and groups do not have the bridge's layout.
    """
    chunks = chunk_parameters(model_chunks, bridge, groups)
    dims = bridge.dims
    for entry in exported_entries(bridge, head):
        if entry.is_on(groups.pp.rank(), groups.ep.rank()):
            shard = parameter_of(entry, chunks).detach()
            shards = _gather(shard, groups.tp) if entry.ep_rank is None else [shard]
            tensors = [tensor.contiguous() for tensor in merge(entry.rule, dims, shards)]
        else:
            tensors = [
                torch.empty(hf.shape(dims), dtype=bridge.transformer.params_dtype, device=platform.device())
                for hf in entry.rule.hf
            ]
        if entry.ep_rank is not None and entry.pp_rank == groups.pp.rank():
            _broadcast(tensors, entry.ep_rank, groups.ep)
        _broadcast(tensors, entry.pp_rank, groups.pp)
        yield from zip(entry.hf_names, tensors)


def _broadcast(tensors: list[Tensor], source: int, group: dist.ProcessGroup) -> None:
    """Copy tensors from the ``source``-th rank of a group to all its ranks, in place."""
    if group.size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=dist.get_global_rank(group, source), group=group)


def _gather(shard: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Gather the shards of all ranks, in rank order."""
    if group.size() == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return shards

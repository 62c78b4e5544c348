"""Digests of every layer's output for one sequence. They are the same in every layout of an aligned role."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hetero_ppo.distributed.text import broadcast_json
from hetero_ppo.engines.model_engine import ModelEngine
from hetero_ppo.types import Microbatch


def layer_digests(
    engine: ModelEngine, token_ids: list[int], neighbours: Sequence[list[int]] = (), num_columns: int = 0
) -> list[tuple[str, str]]:
    """Return (layer, first 16 hex digits of the SHA-256 of its output's bytes) in the order of the forward. Collective.

    Args:
        engine: Role, during its turn if it shares a device.
        token_ids: Sequence whose outputs are digested.
        neighbours: Other sequences of its micro-batch.
        num_columns: Columns that the micro-batch is padded to, unless its longest sequence is longer.
    """
    length, rows = len(token_ids), [token_ids, *neighbours]
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.zeros(len(rows), engine.forward_size.padded(max(num_columns, int(lengths.max()))), dtype=torch.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = torch.tensor(row)
    # Padding is computed only if its outputs are asked for.
    output_mask = torch.ones_like(padded, dtype=torch.bool) if num_columns else None
    found: dict[int, tuple[str, str]] = {}
    sequence_parallel = engine.bridge.transformer.sequence_parallel

    def hook(place: int, name: str) -> Callable[..., None]:
        def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            found[place] = (name, digest(_whole(hidden, engine.groups.tp if sequence_parallel else None)[:length, 0]))

        return keep

    handles = [module.register_forward_hook(hook(place, name)) for place, name, module in _layers(engine)]
    try:
        with torch.no_grad():
            engine.run_schedule(
                engine.models,
                [Microbatch(padded, lengths, output_mask=output_mask)],
                lambda output, microbatch: output,
                forward_only=True,
            )
    finally:
        for handle in handles:
            handle.remove()
    pp_group = engine.groups.pp
    own = [[place, *entry] for place, entry in found.items()]
    stages = [broadcast_json(own, rank, pp_group) for rank in dist.get_process_group_ranks(pp_group)]
    return [(name, value) for _, name, value in sorted(entry for stage in stages for entry in stage)]


def _layers(engine: ModelEngine) -> list[tuple[int, str, torch.nn.Module]]:
    """Return (place in the forward, name, module) of the layers on this rank."""
    layout = engine.bridge.pipeline_layout
    layers: list[tuple[int, str, torch.nn.Module]] = []
    for index, chunk in enumerate(engine.models):
        if chunk.pre_process:
            layers.append((-1, "embedding", chunk.embedding))
        for local, layer in enumerate(chunk.decoder.layers):
            number = layout.global_layer(engine.groups.pp.rank(), index, local)
            layers.append((number, f"layer {number}", layer))
        if chunk.post_process:
            layers.append((layout.num_layers, "final norm", chunk.decoder.final_layernorm))
    return layers


def _whole(hidden: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Gather the slices of all tensor-parallel ranks, [s / tp, b, h] -> [s, b, h]."""
    if tp_group is None:
        return hidden
    parts = [torch.empty_like(hidden) for _ in range(tp_group.size())]
    dist.all_gather(parts, hidden.contiguous(), group=tp_group)
    return torch.cat(parts)


def digest(tensor: Tensor) -> str:
    """Return the first 16 hex digits of the SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes()).hexdigest()[:16]

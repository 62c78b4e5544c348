"""The list of rules that make up a model with a given head. Import, stream and export all use it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch.nn import Parameter

import megatron_bridge.platform  # noqa: F401

# isort: split
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_bridge.families import decoder
from megatron_bridge.families.param_mapping import Entry, Sharding, Rule, entries
from megatron_bridge.model.config_mapping import BridgeConfig

HEADS = ("lm", "value", "score")


def exported_entries(bridge: BridgeConfig, head: str) -> Iterator[Entry]:
    """Yield every Hugging Face tensor of the model once, in state-dict order. With tied embeddings there is no ``lm_head.weight``.

    Raises:
        ValueError: The head is unknown.
    """
    if head not in HEADS:
        raise ValueError(f"head {head!r} is unknown; use one of {', '.join(HEADS)}")
    output: Rule | None = decoder.SCORE_HEAD
    if head == "lm":
        output = None if bridge.tie_word_embeddings else decoder.LM_HEAD
    return entries(
        [_aligned(rule) for rule in bridge.family.layer_rules] if bridge.aligned else bridge.family.layer_rules,
        bridge.family.expert_rules,
        bridge.pipeline_layout,
        bridge.expert_layout,
        embedding=decoder.EMBEDDING,
        final_norm=decoder.FINAL_NORM,
        output=output,
    )


def _aligned(rule: Rule) -> Rule:
    """Return the rule of an aligned model: row-parallel layers divide their weights by outputs."""
    return replace(rule, kind=Sharding.OUTPUT) if rule.kind is Sharding.ROW else rule


def loaded_entries(bridge: BridgeConfig, head: str) -> list[Entry]:
    """List every Megatron parameter once. The last stage of a pipeline has its own copy of tied embeddings."""
    plan = list(exported_entries(bridge, head))
    layout = bridge.pipeline_layout
    if head == "lm" and bridge.tie_word_embeddings and layout.pp_size > 1:
        plan.append(Entry(decoder.TIED_LM_HEAD, *layout.last))
    return plan


def chunk_parameters(
    model_chunks: Sequence[GPTModel], bridge: BridgeConfig, groups: ProcessGroupCollection
) -> list[dict[str, Parameter]]:
    """Return the parameters of each chunk by name, after checking that chunks and groups have the bridge's layout.

    Raises:
        ValueError: They have another layout.
    """
    config = bridge.transformer
    sizes = {
        "tensor": (config.tensor_model_parallel_size, groups.tp.size()),
        "pipeline": (config.pipeline_model_parallel_size, groups.pp.size()),
        "expert": (config.expert_model_parallel_size, groups.ep.size()),
        "virtual_pipeline": (bridge.pipeline_layout.vp_size, len(model_chunks)),
    }
    for name, (planned, given) in sizes.items():
        if planned != given:
            raise ValueError(
                f"{name} parallelism is {planned} in the bridge config but {given} in the model or its groups"
            )
    return [dict(chunk.named_parameters()) for chunk in model_chunks]


def parameter_of(entry: Entry, chunks: Sequence[dict[str, Parameter]]) -> Parameter:
    """Return the parameter of an entry on a rank that holds it."""
    chunk = chunks[entry.chunk]
    found = [chunk[name] for name in entry.megatron_names if name in chunk]
    assert len(found) == 1, f"no single parameter among {entry.megatron_names} in chunk {entry.chunk}"
    return found[0]

"""Load a Hugging Face checkpoint into Megatron-Core model chunks; every rank reads only its own part."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import megatron_bridge.platform  # noqa: F401

# isort: split
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_bridge.families.param_mapping import Entry, shard
from megatron_bridge.model.config_mapping import BridgeConfig
from megatron_bridge.weights.hf_checkpoint import FLOAT_DTYPES, HfCheckpoint
from megatron_bridge.weights.weight_plan import chunk_parameters, loaded_entries, parameter_of

#: Buffers that old transformers versions wrote; the config determines them.
_ROTARY_BUFFER = re.compile(r"\.rotary_emb\.inv_freq$")
_EMBEDDING = "model.embed_tokens.weight"
_LM_HEAD = "lm_head.weight"
_SCORE = "score.weight"
_COMPARED_ROWS = 4096  # rows of two vocabulary matrices that are compared at a time


@dataclass(frozen=True)
class LoadReport:
    """Result of loading a checkpoint on one rank."""

    loaded: int  # Hugging Face tensors of which this rank read its part
    initialised: list[str] = field(default_factory=list)  # tensors that the checkpoint lacks; they stay as initialised


def load_hf(
    model_chunks: list[GPTModel],
    bridge: BridgeConfig,
    path: str | Path,
    groups: ProcessGroupCollection,
    *,
    head: str = "lm",
) -> LoadReport:
    """Fill every parameter of this rank's chunks from the safetensors in ``path``.

    Every rank checks the names, shapes and dtypes of the whole checkpoint, so that either all ranks stop or none.

    Args:
        model_chunks: Unwrapped chunks from ``build_model``, in virtual-stage order.
        bridge: Mapped config and layout.
        path: Checkpoint folder.
        groups: Process groups of the role; the ranks in tp, ep and pp choose this rank's part, without communication.
        head: "lm", or "value" / "score" for a model with one output. If the checkpoint is a language model, such a head
            stays as it was initialised and ``lm_head.weight`` is not read.

    Raises:
        ValueError: A tensor is missing, unknown, of the wrong shape or not floating point, or the layouts disagree.
    """
    chunks = chunk_parameters(model_chunks, bridge, groups)
    plan = loaded_entries(bridge, head)
    with HfCheckpoint(path) as checkpoint:
        initialised = _check(checkpoint, bridge, plan, head)
        here = [entry for entry in plan if entry.is_on(groups.pp.rank(), groups.ep.rank())]
        mine = [entry for entry in here if not set(entry.hf_names) & set(initialised)]
        for entry in mine:
            tensors = [checkpoint.lazy(name) for name in entry.hf_names]
            tp_rank, tp_size = (groups.tp.rank(), groups.tp.size()) if entry.ep_rank is None else (0, 1)
            value = shard(entry.rule, bridge.dims, tensors, tp_rank, tp_size)
            parameter = parameter_of(entry, chunks)
            assert parameter.shape == value.shape, (entry.megatron_names, parameter.shape, value.shape)
            with torch.no_grad():
                parameter.copy_(value)
    _check_complete(chunks, here)
    return LoadReport(loaded=len({name for entry in mine for name in entry.hf_names}), initialised=initialised)


def check_checkpoint(path: str | Path, bridge: BridgeConfig, head: str) -> list[str]:
    """Compare names, shapes and dtypes of a checkpoint's tensors with the model's. Reads only the headers of the files.

    Args:
        path: Checkpoint folder.
        bridge: Model in any layout.
        head: "lm", "value" or "score".

    Returns:
        Names of the tensors that the checkpoint lacks and that would be initialised.

    Raises:
        ValueError: A tensor is missing, unknown, of the wrong shape or not floating point.
    """
    with HfCheckpoint(path) as checkpoint:
        return _check(checkpoint, bridge, loaded_entries(bridge, head), head)


def _check(checkpoint: HfCheckpoint, bridge: BridgeConfig, plan: Sequence[Entry], head: str) -> list[str]:
    """Compare the checkpoint with the plan. Returns the names that the model keeps as initialised."""
    expected = {name: hf.shape(bridge.dims) for entry in plan for name, hf in zip(entry.hf_names, entry.rule.hf)}
    found = {name for name in checkpoint.tensors if not _ROTARY_BUFFER.search(name)}
    initialised = _initialised(found, bridge, head)
    missing = [name for name in expected if name not in found and name not in initialised]
    if missing:
        raise ValueError(f"{checkpoint.source}: {_some(missing)} missing; the config asks for it")
    unused = {_LM_HEAD} if head != "lm" or bridge.tie_word_embeddings else set()
    unknown = sorted(found - expected.keys() - unused)
    if unknown:
        raise ValueError(
            f"{checkpoint.tensors[unknown[0]].file}: {_some(unknown)} unknown; a {bridge.family.architecture(head)} "
            "with this config has no such tensor"
        )
    for name in sorted(expected.keys() & found):
        info = checkpoint.tensors[name]
        if info.shape != expected[name]:
            raise ValueError(
                f"{info.file}: {name} has shape {list(info.shape)}, the config asks for {list(expected[name])}"
            )
        if info.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{info.file}: {name} has dtype {info.dtype}; quantised checkpoints are not supported")
    if head == "lm" and bridge.tie_word_embeddings and _LM_HEAD in found:
        _check_tied(checkpoint)
    return initialised


def _initialised(found: set[str], bridge: BridgeConfig, head: str) -> list[str]:
    """Return the scalar head's name if the checkpoint is a language model's, which has no such head."""
    classifier = bridge.family.sequence_classifier in (bridge.hf_config.get("architectures") or ())
    return [_SCORE] if head != "lm" and _SCORE not in found and not classifier else []


def _check_tied(checkpoint: HfCheckpoint) -> None:
    """Check that a checkpoint with two copies of tied embeddings has the same numbers in both."""
    head, embedding = checkpoint.lazy(_LM_HEAD), checkpoint.lazy(_EMBEDDING)
    info = checkpoint.tensors[_LM_HEAD]
    rows = checkpoint.tensors[_EMBEDDING].shape[0]
    same = info.shape == checkpoint.tensors[_EMBEDDING].shape and all(
        torch.equal(head[start : start + _COMPARED_ROWS], embedding[start : start + _COMPARED_ROWS])
        for start in range(0, rows, _COMPARED_ROWS)
    )
    if not same:
        raise ValueError(
            f"{info.file}: {_LM_HEAD} differs from {_EMBEDDING}, but config.json says tie_word_embeddings true; set it "
            "to false, or remove the tensor"
        )


def _some(names: Sequence[str], limit: int = 4) -> str:
    shown = ", ".join(names[:limit])
    if len(names) > limit:
        return f"{shown} and {len(names) - limit} more are"
    return f"{shown} {'is' if len(names) == 1 else 'are'}"


def _check_complete(chunks: Sequence[dict[str, torch.nn.Parameter]], here: Sequence[Entry]) -> None:
    """Assert that the tables have a rule for every parameter of the model."""
    for number, chunk in enumerate(chunks):
        named = {name for entry in here if entry.chunk == number for name in entry.megatron_names}
        left = chunk.keys() - named
        assert not left, f"no rule for {sorted(left)} of chunk {number}"

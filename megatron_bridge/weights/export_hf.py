"""Save a distributed model as a Hugging Face checkpoint folder that transformers and vLLM can load."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import megatron_bridge.platform  # noqa: F401

# isort: split
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_bridge.model.config_mapping import BridgeConfig, read_hf_config
from megatron_bridge.weights.hf_checkpoint import INDEX_FILE, SINGLE_FILE, check_links, tensor_names, write_safetensors
from megatron_bridge.weights.stream import stream_hf
from megatron_bridge.weights.weight_plan import exported_entries

_EMBEDDING = "model.embed_tokens.weight"
_LM_HEAD = "lm_head.weight"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
MORE_TEMPLATES = "additional_chat_templates"  # folder next to chat_template.jinja


def save_hf(
    model_chunks: list[GPTModel],
    bridge: BridgeConfig,
    groups: ProcessGroupCollection,
    out_dir: str | Path,
    *,
    source_dir: str | Path,
    tokenizer_dir: str | Path | None = None,
    head: str = "lm",
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = 5e9,
    files: Mapping[str, str] | None = None,
    config_changes: Mapping[str, Any] | None = None,
) -> None:
    """Write a whole checkpoint: config, generation config, tokenizer files, and weights in one file or several.

    Collective over the role's ranks: one rank writes, and all return when the folder is in place. The folder is written next to ``out_dir``
    and then renamed, so ``out_dir`` is never half a checkpoint. A folder that was there before is replaced.

    Args:
        model_chunks: Model chunks of this rank.
        bridge: Mapped config and layout.
        groups: Process groups of the role: tp, ep and pp gather the weights, dp_cp chooses the replica that writes.
        out_dir: Folder to write.
        source_dir: Checkpoint whose config.json, generation_config.json and tokenizer are copied.
        tokenizer_dir: Folder to copy the tokenizer from instead.
        head: "lm", or "value" / "score": the folder is then a sequence classifier with one label.
        dtype: Dtype of the saved tensors; None: the parameters'.
        max_shard_bytes: Most bytes of tensors in one file.
        files: Name -> text of further files; they replace copied files of the same name.
        config_changes: Entries of config.json that differ from the source's.

    Raises:
        ValueError: The head is unknown, source_dir has no checkpoint, or chunks and groups do not have the bridge's layout.
    """
    # Every rank checks the source before the first collective: an error later would leave the other ranks waiting.
    for folder in {source_dir, tokenizer_dir or source_dir}:
        check_links(Path(folder))
    dtype = dtype or bridge.transformer.params_dtype
    source_config = {**read_hf_config(source_dir), **(config_changes or {})}
    config = exported_config(source_config, bridge.family.architecture(head), head, dtype)
    tied_twice = head == "lm" and bridge.tie_word_embeddings and _LM_HEAD in tensor_names(source_dir)
    writes = groups.dp_cp.rank() == groups.tp.rank() == groups.pp.rank() == 0
    # Replicas have no tensors to add, unless experts are spread over them.
    if groups.dp_cp.rank() == 0 or groups.ep.size() > 1:
        tensors = stream_hf(model_chunks, bridge, groups, head=head)
        if writes:
            tensors = _with_tied_head(tensors) if tied_twice else tensors
            with _replacing(Path(out_dir)) as folder:
                _write_weights(tensors, folder, dtype, max_shard_bytes)
                (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
                _copy_files(("generation_config.json",), Path(source_dir), folder)
                _copy_files(TOKENIZER_FILES, Path(tokenizer_dir or source_dir), folder)
                _copy_templates(Path(tokenizer_dir or source_dir), folder, files or {})
                for name, text in (files or {}).items():
                    (folder / name).write_text(text, encoding="utf-8")
        else:
            for _ in tensors:
                pass
    for group in (groups.pp, groups.tp, groups.dp_cp):
        dist.barrier(group=group)


@contextmanager
def _replacing(out_dir: Path) -> Iterator[Path]:
    """Give a new folder next to ``out_dir``; at the end it takes ``out_dir``'s name. If writing fails, it is removed."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    new, old = (out_dir.with_name(f".{out_dir.name}.{state}") for state in ("partial", "old"))
    for left_by_a_killed_run in (new, old):
        if left_by_a_killed_run.exists():
            shutil.rmtree(left_by_a_killed_run)
    new.mkdir()
    try:
        yield new
    except BaseException:
        shutil.rmtree(new)
        raise
    if out_dir.exists():
        out_dir.rename(old)
    new.rename(out_dir)
    if old.exists():
        shutil.rmtree(old)


def exported_config(source: dict[str, Any], architecture: str, head: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the source's config with the architecture and dtype of the saved model, and one label for a scalar head."""
    # transformers 5 writes "dtype", older versions "torch_dtype"; if a config has both, either may be read
    keys = [key for key in ("torch_dtype", "dtype") if key in source] or ["dtype"]
    config: dict[str, Any] = {
        **source,
        "architectures": [architecture],
        **dict.fromkeys(keys, str(dtype).removeprefix("torch.")),
    }
    if head != "lm":
        config.pop("num_labels", None)  # transformers derives it from id2label
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return config


def _with_tied_head(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Add the second copy of tied embeddings that the source checkpoint has."""
    embedding: Tensor | None = None
    for name, tensor in tensors:
        if name == _EMBEDDING:
            embedding = tensor.clone()
        yield name, tensor
    assert embedding is not None
    yield _LM_HEAD, embedding


def _write_weights(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, dtype: torch.dtype, max_shard_bytes: float
) -> None:
    """Write the tensors file by file, holding at most one file in memory. The names contain the number of files, so they come last."""
    shard: dict[str, Tensor] = {}
    files: list[list[str]] = []  # names of the tensors in each file
    size = total = 0

    def flush() -> None:
        write_safetensors(shard, folder / f"{len(files)}.safetensors")
        files.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        copy = tensor.to(device="cpu", dtype=dtype, copy=True)
        if shard and size + copy.nbytes > max_shard_bytes:
            flush()
            size = 0
        shard[name] = copy
        size += copy.nbytes
        total += copy.nbytes
    flush()
    if len(files) == 1:
        (folder / "0.safetensors").rename(folder / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def export_bytes(bridge: BridgeConfig, head: str, dtype: torch.dtype) -> int:
    """Return the size in bytes of an export's tensors."""
    shapes = (hf.shape(bridge.dims) for entry in exported_entries(bridge, head) for hf in entry.rule.hf)
    return sum(map(math.prod, shapes)) * dtype.itemsize


def _copy_files(names: Iterable[str], source: Path, target: Path) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _copy_templates(source: Path, target: Path, files: Mapping[str, str]) -> None:
    """Copy the tokenizer's additional chat templates, unless ``files`` replaces its own template."""
    if (source / MORE_TEMPLATES).is_dir() and "chat_template.jinja" not in files:
        shutil.copytree(source / MORE_TEMPLATES, target / MORE_TEMPLATES)

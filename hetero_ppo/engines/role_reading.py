"""Read a role's checkpoint files without running code that they hold.

A role's folder has three places with pickles: ``.metadata`` (torch's description of the tensors), ``common.pt`` (what is not sharded),
and objects beside the tensors in the ``.distcp`` files. Megatron-Core and torch unpickle the first and the last without limits, and a
pickle can call any function. Here the first may name the classes of ``METADATA_CLASSES`` alone, and the others are read with
``weights_only=True``. Checksums are no protection: whoever changes a file can compute them again.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import CachedMetadataFileSystemReader
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
from megatron.core.msc_utils import MultiStorageClientFeature
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

#: Module -> classes and functions that ``.metadata`` may name. They hold values; ``_get_layout`` looks a name up.
METADATA_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "TensorStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
}


def load_role(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fill a sharded state dict from a role's folder. Collective over the world.

    Args:
        state: Sharded state dict of the role.
        folder: Folder of the role in a checkpoint whose manifest was checked.

    Raises:
        ValueError: A file holds more than values, or does not fit the role; it is named.
    """
    read_metadata(folder)  # torch would make an AssertionError of what is wrong with it
    _join_in_place(state)
    try:
        return dist_checkpointing.load(
            state,
            str(folder),
            sharded_strategy=torch_strategy.TorchDistLoadShardedStrategy(),
            common_strategy=_CommonReader(),
        )
    except CheckpointException as error:
        refused = [fault for fault, _ in error.failures.values() if isinstance(fault, ValueError)]
        if not refused:
            raise
        raise ValueError(f"{folder}: {refused[0]}") from error


def _join_in_place(state: dict[str, Any]) -> None:
    """Let Megatron-Core return the tensor whose parts it has filled, where it would join them to a second one."""
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensorFactory):
            entry.merge_fn = functools.partial(_joined, entry.data, entry.merge_fn)


def _joined(whole: Tensor, join: Callable[[Any], Tensor], parts: Any) -> Tensor:
    storage = whole.untyped_storage().data_ptr()
    in_place = all(part.untyped_storage().data_ptr() == storage for part in nested_values([parts]))
    return whole.detach() if in_place else join(parts)


def tensor_names(folder: Path) -> set[str]:
    """Return the names of the tensors that a role's folder holds.

    Raises:
        ValueError: ``.metadata`` holds more than values.
    """
    return set(read_metadata(folder).state_dict_metadata)


def read_metadata(folder: Path) -> Metadata:
    """Read ``.metadata`` of a role's folder.

    Raises:
        ValueError: It names a class that it has no use for, or a file outside of the folder.
    """
    path = folder / ".metadata"
    with path.open("rb") as file:
        metadata = _MetadataUnpickler(file, path).load()
    if type(metadata) is not Metadata:
        raise ValueError(f"{path} holds a {type(metadata).__name__} where a checkpoint's description belongs. {_DO}")
    for name in {info.relative_path for info in metadata.storage_data.values()}:
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{path} names the file {name!r}, which is not in {folder}. {_DO}")
    return metadata


_DO = "The file was changed after it was written: do not use this checkpoint, and find out where it comes from"


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """Return the class of a name in the pickle, if a checkpoint may use it."""
        if name in METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        raise ValueError(
            f"{self._path} would run or make {module}.{name} when it is read, which a checkpoint has no use for. {_DO}"
        )


class _MetadataReader(CachedMetadataFileSystemReader):
    """Reads ``.metadata`` with the allow-list."""

    _cached_metadata: Metadata | None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._cached_metadata is None:
            metadata = read_metadata(Path(self.path))
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            self._cached_metadata = metadata
        return self._cached_metadata


class _Planner(torch_strategy.MCoreLoadPlanner):
    """Reads the objects beside the tensors as values alone."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        name = read_item.dest_index.fqn
        loaded = _load_values(value, name)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded


class _CommonReader(TorchCommonLoadStrategy):
    """Reads ``common.pt`` as values alone, whatever TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD says."""

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        path = Path(checkpoint_dir) / COMMON_STATE_FNAME
        return _load_values(path, str(path))


def _load_values(source: Path | BytesIO, where: str) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next(
            (line for line in str(error).splitlines() if "GLOBAL" in line), "it is no file of torch.save"
        ).strip()
        raise ValueError(f"{where} holds more than values: {reason}. {_DO}") from error


def _read_values_alone() -> None:
    """Put the readers in the places from which Megatron-Core's strategy takes its own."""
    for name, checked in {"_get_filesystem_reader": _reader, "MCoreLoadPlanner": _Planner}.items():
        assert hasattr(torch_strategy, name), f"Megatron-Core's strategy has no {name}"
        setattr(torch_strategy, name, checked)
    MultiStorageClientFeature.disable()  # with that package installed, Megatron-Core would read files by its own means


def _reader(checkpoint_dir: str | Path, cache_metadata: bool = False) -> _MetadataReader:
    return _MetadataReader(checkpoint_dir)


_read_values_alone()

"""A digest of a checkpoint's model that does not depend on where its files lie and how the weights are divided among them.

It finds weights that were replaced or damaged by accident. It does not stop somebody who replaces them on purpose: blocks of a tensor enter
as CRC-32, which is several times faster than a cryptographic hash.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_bridge.weights.hf_checkpoint import HfCheckpoint

#: Number of bytes read at a time; the last block of a tensor is shorter.
BLOCK = 1 << 22
#: Keys of config.json that do not change what the weights compute.
OTHER_KEYS = frozenset(
    {
        *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "use_cache"),
        *("id2label", "label2id", "num_labels", "bos_token_id", "eos_token_id", "pad_token_id"),
    }
)


def config_digest(folder: str | Path) -> str:
    """Return a digest of the keys of config.json that determine the model's computation."""
    values: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in values.items() if key not in OTHER_KEYS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def model_digest(
    folder: str | Path, rank: int = 0, num_ranks: int = 1, add: Callable[[Tensor], object] = lambda table: None
) -> str:
    """Return a digest of names, dtypes, shapes and bytes of all tensors, and of ``config_digest``. The ranks share the reading.

    Args:
        folder: Hugging Face checkpoint.
        rank: Rank of this process.
        num_ranks: Number of processes that read the folder together.
        add: Function that sums a [tensors, 32] uint8 tensor over the processes, in place.
    """
    with HfCheckpoint(folder) as checkpoint:
        names = sorted(checkpoint.tensors)
        sizes = [(torch.Size(checkpoint.tensors[name].shape).numel(), name) for name in names]
        files = sorted({info.file for info in checkpoint.tensors.values()})
    mine = {name for _, name in sorted(sizes)[rank::num_ranks]}
    row_of = {name: row for row, name in enumerate(names)}
    table = torch.zeros(len(names), hashlib.sha256().digest_size, dtype=torch.uint8)
    for file in files:
        for name, digest in _tensor_digests(file, mine):
            table[row_of[name]] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
    add(table)
    whole = hashlib.sha256(config_digest(folder).encode())
    whole.update(json.dumps(names).encode())
    whole.update(bytes(table.flatten().tolist()))
    return whole.hexdigest()


def _tensor_digests(file: Path, names: set[str]) -> list[tuple[str, bytes]]:
    """Return (name, SHA-256 of dtype, shape and blocks' CRC-32) of the given tensors of a safetensors file, in the order of their bytes."""
    found = []
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if name not in names:
                continue
            start, end = about["data_offsets"]
            digest = hashlib.sha256(json.dumps([about["dtype"], about["shape"]]).encode())
            stream.seek(8 + length + start)
            left = end - start
            while left:
                block = stream.read(min(BLOCK, left))
                if not block:
                    raise ValueError(f"{file}: ends before the end of {name}; download or save it again")
                digest.update(zlib.crc32(block).to_bytes(4, "little"))
                left -= len(block)
            found.append((name, digest.digest()))
    return found

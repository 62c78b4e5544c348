"""Carries the actor's weights to running servers.

A sync writes the tensors, as they come, into safetensors shards of a new directory (mode 0700, in /dev/shm where there is one), from
where servers read them or are sent them (``transports.py``), lets every server check them (names, shapes, checksums), and only then pauses the servers, swaps the weights, compares what the
servers' parameters hold with the checksums, drops the prefix cache, sets the weight version and resumes. The last version's files
stay until the next one is in place: a server that has to be restarted gets them again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hetero_ppo.config.schema import Dtype
from hetero_ppo.disk import free_text, size_text, writing
from hetero_ppo.errors import RunError
from hetero_ppo.rollout.servers.client import ServerClient
from hetero_ppo.rollout.weights.tensor_bytes import tensor_bytes, tensor_checksum
from hetero_ppo.rollout.weights.weight_group import Shard
from hetero_ppo.step.kinds import SHARD_BYTES
from megatron_bridge.platform.copies import pinned_host_memory, release_pinned

#: Where there is no room for weights.
SHM_REMEDY = "make it larger (docker run --shm-size, mount -o remount,size=): two versions of the weights lie there during a sync"
TORCH_DTYPE = {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16}
SAFETENSORS_DTYPE = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class WeightFiles:
    """One version's tensors on disk."""

    version: str
    paths: list[Path]
    checksums: dict[str, str]  # tensor name -> of its bytes
    num_bytes: int  # of all tensors, in the engine's dtype


@dataclass(frozen=True)
class SyncStats:
    """What the last weight sync took."""

    num_bytes: int  # of the model in the engine's dtype, once however many servers took it
    seconds: float  # from the first tensor asked for to the last server answering prompts again
    write_s: float  # of them, taking the tensors from the trainer, hashing and writing them
    checksum_s: float  # of them, the slowest server's own checksums
    probe_s: float = 0.0  # after them, the probe prompt on all servers; 0: not asked

    @property
    def gb_s(self) -> float:
        """Bytes of the model over all of the seconds, GB/s."""
        return self.num_bytes / self.seconds / 1e9

    def metrics(self) -> dict[str, float]:
        return {
            "rollout/sync_s": self.seconds,
            "rollout/sync_gb_s": self.gb_s,
            "rollout/verify_s": self.checksum_s + self.probe_s,
        }


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Writes one safetensors file (8-byte header length, JSON header, raw data) and returns the tensors' checksums.

    The library's ``save_file`` refuses tensors that share a storage, which is what views of a flat parameter buffer do, and
    its lower-level twin copies every tensor to ``bytes``.
    """
    header, offset = _header(tensors)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    full_disk = writing(path, "weights for the rollout servers", 8 + len(text) + offset, SHM_REMEDY)
    with ThreadPoolExecutor(max_workers=1) as pool, full_disk, open(path, "xb", opener=_private_opener) as file:
        checksums = pool.map(tensor_checksum, tensors.values())  # beside the writing; both release the GIL
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(tensor_bytes(tensor) for tensor in tensors.values())
        return dict(zip(tensors, checksums, strict=True))


def _header(tensors: dict[str, Tensor]) -> tuple[dict[str, Any], int]:
    """Return the safetensors header of tensors that lie one after the other, and their number of bytes."""
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": SAFETENSORS_DTYPE[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    return header, offset


class PinnedStaging:
    """Page-locked host memory that bytes cross by, in one block at a time; it grows to the largest and is kept for the next sync."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def take(self, num_bytes: int) -> Tensor:
        """Return [num_bytes] uint8; what was taken before is overwritten.

        Raises:
            RuntimeError: the host memory cannot be page-locked.
        """
        if self._memory is None or self._memory.numel() < num_bytes:
            self.close()
            self._memory = pinned_host_memory(num_bytes)
        return self._memory[:num_bytes]

    def close(self) -> None:
        """Give the memory back; may be called more than once."""
        if self._memory is not None:
            release_pinned(self._memory)
            self._memory = None


@dataclass(frozen=True)
class BlockWriter:
    """Packs the tensors of a file into one block on their device, which then crosses to the host at once, by pinned memory."""

    staging: PinnedStaging
    keep: Callable[[Shard], None] | None = None  # takes the blocks; None: they are let go of

    def on_host(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors in host memory, until the next call."""
        header, num_bytes = _header(tensors)
        block = Shard(header, torch.cat([tensor.view(-1).view(torch.uint8) for tensor in tensors.values()]))
        on_host = Shard(header, self.staging.take(num_bytes))
        on_host.data.copy_(block.data)
        if self.keep is not None:
            self.keep(block)
        return on_host.tensors()


def _private_opener(path: str, flags: int) -> int:
    return os.open(path, flags, mode=0o600)


def write_weights(
    directory: Path,
    tensors: Iterator[tuple[str, Tensor]],
    version: str,
    dtype: Dtype,
    writer: BlockWriter | None = None,
) -> WeightFiles:
    """Writes a stream of (Hugging Face name, tensor) into ``directory`` in the engine's dtype.

    No more than one shard is held at a time. The directory appears under its name when all of it is written.

    Args:
        directory: new.
        tensors: read once, in order.
        version: label of the weights.
        dtype: of the engine.
        writer: brings tensors of a GPU to the host; None: they are host memory.

    Raises:
        ValueError: the stream is empty or names a tensor twice.
    """
    partial = directory.with_name(directory.name + ".partial")
    partial.mkdir(mode=0o700)
    try:
        shards, num_bytes = _write_shards(partial, tensors, version, TORCH_DTYPE[dtype], writer)
    except BaseException:
        shutil.rmtree(partial)
        raise
    partial.rename(directory)
    checksums = {name: digest for shard in shards.values() for name, digest in shard.items()}
    return WeightFiles(version, [directory / name for name in shards], checksums, num_bytes)


def _write_shards(
    directory: Path, tensors: Iterator[tuple[str, Tensor]], version: str, dtype: torch.dtype, writer: BlockWriter | None
) -> tuple[dict[str, dict[str, str]], int]:
    """File name -> tensor name -> checksum, and the bytes of all tensors."""
    shards: dict[str, dict[str, str]] = {}
    seen: set[str] = set()
    shard: dict[str, Tensor] = {}
    shard_bytes = num_bytes = 0

    def flush() -> None:
        file_name = f"shard_{len(shards):05d}.safetensors"
        shards[file_name] = _write_shard(directory / file_name, shard if writer is None else writer.on_host(shard))
        shard.clear()

    for name, tensor in tensors:
        if name in seen:
            raise ValueError(f"weight sync {version!r}: tensor {name!r} comes twice in the stream")
        seen.add(name)
        if writer is None:
            shard[name] = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
        else:  # a copy on the device: the stream may use the tensor's memory for the next one
            shard[name] = tensor.detach().to(dtype, copy=True).contiguous()
        tensor_size = shard[name].numel() * shard[name].element_size()
        shard_bytes, num_bytes = shard_bytes + tensor_size, num_bytes + tensor_size
        if shard_bytes >= SHARD_BYTES:
            flush()
            shard_bytes = 0
    if not seen:
        raise ValueError(f"weight sync {version!r}: the stream has no tensors")
    if shard:
        flush()
    return shards, num_bytes


def check_room_for_another(files: WeightFiles) -> None:
    """Refuse to go on from the first sync when the next one, which leaves these files until it is done, would find no room.

    Raises:
        RunError: There is not as much free as these files take.
    """
    folder = files.paths[0].parent
    if shutil.disk_usage(folder).free < files.num_bytes:
        raise RunError(
            f"the next weights for the rollout servers will not fit beside {folder}: a version takes {size_text(files.num_bytes)}; "
            f"{free_text(folder)}. Make room there, or {SHM_REMEDY}"
        )


def remove_weights(files: WeightFiles) -> None:
    shutil.rmtree(files.paths[0].parent)


async def stage(
    client: ServerClient,
    files: WeightFiles,
    timeout_s: float,
    *,
    reads_files: bool = True,
    checksums: dict[str, str] | None = None,
) -> float:
    """Lets a server check the tensors; its weights stay as they are.

    Args:
        client: of the server.
        files: the tensors.
        timeout_s: deadline.
        reads_files: True: it reads them from the files; False: they were brought to it (``transports.py``).
        checksums: what the server's own have to be, by tensor name; None: those of the files.

    Returns:
        Seconds the server's slowest worker spent on checksums.

    Raises:
        ValueError: a tensor is missing, unknown, or of the wrong shape.
        RuntimeError: a tensor's bytes did not arrive as they were sent.
    """
    paths = [str(path) for path in files.paths] if reads_files else None
    results = await client.call_worker("weight sync", "hetero_ppo_stage_weights", timeout_s, paths=paths)
    for result in results:
        if result["problems"]:
            shown = "; ".join(result["problems"][:8])
            more = len(result["problems"]) - 8
            raise ValueError(
                f"weight sync {files.version!r}: the tensors do not fit the model of {client.server.name}: {shown}"
                + (f"; and {more} more" if more > 0 else "")
                + ". The server keeps its old weights."
            )
        expected = files.checksums if checksums is None else checksums
        wrong = sorted(name for name, digest in expected.items() if result["checksums"][name] != digest)
        if wrong:
            raise RunError(
                f"weight sync {files.version!r}: {client.server.name} read other bytes than were written for {wrong[:8]}"
            )
    return max(result["verify_s"] for result in results)


async def swap(client: ServerClient, files: WeightFiles, timeout_s: float, *, verify: bool) -> float:
    """Puts staged weights in place and drops everything that was computed with the old ones.

    Args:
        client: of a server that has staged ``files``.
        files: the new weights.
        timeout_s: deadline of every one of the calls.
        verify: compare the checksums of what the server's parameters hold afterwards with those of ``files``.

    Returns:
        Seconds the server's slowest worker spent on checksums.

    Raises:
        RuntimeError: the parameters hold something else, or the prefix cache could not be dropped.
    """
    phase = f"weight sync {files.version!r}"
    await client.post("weight sync", "/pause?mode=wait", timeout_s)
    results = await client.call_worker("weight sync", "hetero_ppo_load_staged", timeout_s, verify=verify)
    for rank, result in enumerate(results):
        for found, what in (("wrong", "hold other bytes than were sent for"), ("unread", "were not found to hold")):
            if result[found]:
                raise RunError(
                    f"{phase}: the parameters of {client.server.name} (tensor-parallel rank {rank}) {what} "
                    f"{result[found][:8]}, {len(result[found])} in all"
                )
    reset = await client.post("weight sync", "/reset_prefix_cache", timeout_s)
    if not reset["success"]:
        raise RunError(f"{phase}: {client.server.name} could not reset its prefix cache")
    await client.post("weight sync", "/update_weight_version", timeout_s, {"new_version": files.version})
    await client.post("weight sync", "/resume", timeout_s)
    return max(result["verify_s"] for result in results)

"""One version of the weights on its way to the servers: packed into buckets, checksummed, and copied to files where that is needed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hetero_ppo.config.schema import Dtype
from hetero_ppo.disk import free_text, size_text, writing
from hetero_ppo.errors import RunError
from hetero_ppo.rollout.weights.bucket import Bucket, PinnedStaging, bucket_header, pack
from hetero_ppo.rollout.weights.targets import POLICY
from hetero_ppo.rollout.weights.tensor_bytes import checksum_on, tensor_bytes, tensor_checksum
from hetero_ppo.step.kinds import SHARD_BYTES

#: What to do where the files find no room.
SHM_REMEDY = "make it larger (docker run --shm-size, mount -o remount,size=): two versions of the weights lie there during a sync"
TORCH_DTYPE = {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16}


@dataclass(frozen=True)
class WeightVersion:
    """The tensors of one version, and where they are. Either there are files, or there are buckets until all servers have loaded."""

    target: str  # model that they are for
    version: str  # label
    checksums: dict[str, str]  # tensor name -> checksum of its bytes, of the kind that the servers compute
    num_bytes: int  # of all tensors, in the servers' dtype
    paths: list[Path]  # one safetensors file per bucket, in order; empty: there is no file copy
    # On the trainer's device; empty: they were released.
    buckets: list[Bucket] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Packer:
    """Rules for packing tensors into buckets on their own device, before anything is copied to the host."""

    staging: PinnedStaging  # host memory that a GPU's bucket is copied to a file by
    keeps_buckets: bool  # for a transport that sends buckets; their checksums are computed where they are

    def on_host(self, bucket: Bucket) -> Bucket:
        """Return the bucket in host memory. The next call overwrites it."""
        if bucket.data.device.type == "cpu":
            return bucket
        host = self.staging.take(bucket.data.numel())
        host.copy_(bucket.data)
        return Bucket(bucket.header, host)


def take_weights(
    directory: Path | None,
    tensors: Iterator[tuple[str, Tensor]],
    version: str,
    dtype: Dtype,
    packer: Packer | None = None,
    target: str = POLICY,
) -> WeightVersion:
    """Read a stream of tensors once, bucket by bucket, in the servers' dtype.

    A bucket is complete with the tensor that makes it ``SHARD_BYTES`` or more. The directory gets its name when all files are written.

    Args:
        directory: New folder for the file copy, mode 0700. None: no file copy is made, so ``packer`` must keep the buckets.
        tensors: Pairs of Hugging Face name and full tensor.
        version: Label of the weights.
        dtype: The servers' dtype.
        packer: How to pack the tensors. None: they are in host memory and are written to files as they are.
        target: Model that the weights are for.

    Raises:
        ValueError: The stream is empty, or has a tensor twice.
    """
    assert directory is not None or (packer is not None and packer.keeps_buckets), "the weights would be nowhere"
    reader = _Reader(version, TORCH_DTYPE[dtype], packer)
    if directory is None:
        reader.read(tensors, None)
        return reader.weights(target, [])
    partial = directory.with_name(directory.name + ".partial")
    partial.mkdir(mode=0o700)
    try:
        reader.read(tensors, partial)
    except BaseException:
        shutil.rmtree(partial)
        raise
    partial.rename(directory)
    return reader.weights(target, [directory / name for name in reader.file_names])


class _Reader:
    """Cuts a stream of tensors into buckets and collects their checksums.

    Args:
        version: Label of the weights, for errors.
        dtype: Dtype of the buckets.
        packer: How to pack them, see ``take_weights``.
    """

    def __init__(self, version: str, dtype: torch.dtype, packer: Packer | None) -> None:
        self._version, self._dtype, self._packer = version, dtype, packer
        self._checksums: dict[str, str] = {}
        self._buckets: list[Bucket] = []
        self._num_bytes = 0
        self.file_names: list[str] = []

    def read(self, tensors: Iterator[tuple[str, Tensor]], directory: Path | None) -> None:
        """Read the stream to its end.

        Raises:
            ValueError: It is empty, or has a tensor twice.
        """
        seen: set[str] = set()
        group: dict[str, Tensor] = {}
        group_bytes = 0
        for name, tensor in tensors:
            if name in seen:
                raise ValueError(f"weight sync {self._version!r}: tensor {name!r} comes twice in the stream")
            seen.add(name)
            group[name] = self._taken(tensor)
            group_bytes += group[name].nbytes
            if group_bytes >= SHARD_BYTES:
                self._store(group, directory)
                group, group_bytes = {}, 0
        if not seen:
            raise ValueError(f"weight sync {self._version!r}: the stream has no tensors")
        if group:
            self._store(group, directory)

    def weights(self, target: str, paths: list[Path]) -> WeightVersion:
        """Return the version that was read."""
        return WeightVersion(target, self._version, self._checksums, self._num_bytes, paths, self._buckets)

    def _taken(self, tensor: Tensor) -> Tensor:
        """Return a contiguous tensor in the servers' dtype, which stays as it is until its bucket is stored."""
        if self._packer is None:
            return tensor.detach().to(device="cpu", dtype=self._dtype).contiguous()
        # A copy, because the stream may use the tensor's memory for the next one.
        return tensor.detach().to(self._dtype, copy=True).contiguous()

    def _store(self, group: dict[str, Tensor], directory: Path | None) -> None:
        """Store the tensors of one bucket: on their device, in a file, or both."""
        self._num_bytes += sum(tensor.nbytes for tensor in group.values())
        packer = self._packer
        if packer is not None:
            bucket = pack(group)
            if packer.keeps_buckets:
                self._buckets.append(bucket)
                checksum = checksum_on(bucket.data.device)
                self._checksums |= {name: checksum(tensor) for name, tensor in bucket.tensors().items()}
            if directory is None:
                return
            group = packer.on_host(bucket).tensors()
        assert directory is not None  # without a packer there are files
        name = f"shard_{len(self.file_names):05d}.safetensors"
        self.file_names.append(name)
        is_summed = packer is not None and packer.keeps_buckets
        self._checksums |= write_file(directory / name, group, with_checksums=not is_summed)


def write_file(path: Path, tensors: dict[str, Tensor], *, with_checksums: bool) -> dict[str, str]:
    """Write one safetensors file (8-byte header length, JSON header, raw data).

    The library's ``save_file`` refuses tensors that share a storage, which is what views of a flat parameter buffer do, and
    its lower-level twin copies every tensor to ``bytes``.

    Args:
        path: New file, mode 0600.
        tensors: Contiguous tensors in host memory.
        with_checksums: Whether to compute the tensors' CRC-32 while the file is written. Both release Python's lock.

    Returns:
        Tensor name -> checksum; empty without checksums.
    """
    header, num_bytes = bucket_header(tensors)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    full_disk = writing(path, "weights for the rollout servers", 8 + len(text) + num_bytes, SHM_REMEDY)
    with ThreadPoolExecutor(max_workers=1) as pool, full_disk, open(path, "xb", opener=_private_opener) as file:
        checksums = pool.map(tensor_checksum, tensors.values()) if with_checksums else None
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(tensor_bytes(tensor) for tensor in tensors.values())
        return {} if checksums is None else dict(zip(tensors, checksums, strict=True))


def _private_opener(path: str, flags: int) -> int:
    return os.open(path, flags, mode=0o600)


def check_room_for_another(weights: WeightVersion) -> None:
    """Check that the next version's files find room. This version's files stay until the next sync is done.

    Raises:
        RunError: Less is free than this version's files take.
    """
    if not weights.paths:
        return
    folder = weights.paths[0].parent
    if shutil.disk_usage(folder).free < weights.num_bytes:
        raise RunError(
            f"the next weights for the rollout servers will not fit beside {folder}: a version takes {size_text(weights.num_bytes)}; "
            f"{free_text(folder)}. Make room there, or {SHM_REMEDY}"
        )


def remove_files(weights: WeightVersion) -> None:
    """Remove the file copy of a version, if it has one."""
    if weights.paths:
        shutil.rmtree(weights.paths[0].parent)

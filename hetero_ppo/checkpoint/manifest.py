"""The manifest of a checkpoint: size and CRC-32 of every file. It is written last, and checked before anything is read.

Checksums find damage by a disk or a copy. They do not prove who wrote the files: reading a checkpoint must be safe without them
(``engines/role_reading.py``).
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

#: File that marks a complete checkpoint; it holds the manifest.
COMPLETE = "COMPLETE"
#: Number of bytes read at a time.
BLOCK = 1 << 22


def files_of(folder: Path) -> list[Path]:
    """Return all files of a checkpoint except the marker, sorted by name."""
    return sorted(path for path in folder.rglob("*") if path != folder / COMPLETE and not _is_folder(path))


def file_digest(path: Path, *, fsync: bool) -> tuple[int, int]:
    """Return size in bytes and CRC-32 of a file.

    Args:
        path: File to read.
        fsync: Whether to wait first until its contents are on the disk.
    """
    size, crc = 0, 0
    with path.open("rb") as file:
        if fsync:
            os.fsync(file.fileno())
        while block := file.read(BLOCK):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return size, crc


def share_digests(folder: Path, rank: int, num_ranks: int, *, fsync: bool) -> dict[str, tuple[int, int]]:
    """Return path in the folder -> size and CRC-32 of the files that belong to this rank's share."""
    mine = files_of(folder)[rank::num_ranks]
    return {str(path.relative_to(folder)): file_digest(path, fsync=fsync) for path in mine}


def write_marker(folder: Path, manifest: dict[str, tuple[int, int]]) -> None:
    """Write the marker, which makes the checkpoint complete."""
    write_text(folder / COMPLETE, json.dumps({"files": manifest, "sha256": _digest(manifest)}))
    for inner in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        fsync_dir(inner)


def read_marker(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the manifest.

    Raises:
        ValueError: The marker is not one that ``write_marker`` wrote, or names a file outside the folder.
    """
    path = folder / COMPLETE
    try:
        marker = json.loads(path.read_text())
        manifest = {name: (int(size), int(crc)) for name, (size, crc) in marker["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not readable: the checkpoint is damaged, or of another version") from error
    if "sha256" in marker and marker["sha256"] != _digest(manifest):
        raise ValueError(f"{path} is damaged: its own checksum (SHA-256) does not fit its list of files")
    outside = [name for name in manifest if not _is_inside(name)]
    if outside:
        raise ValueError(
            f"{path} names {outside[0]!r}, which is not a file of the checkpoint: do not use this checkpoint"
        )
    return manifest


def has_own_checksum(folder: Path) -> bool:
    """Return whether the marker has a checksum of itself; older versions wrote none. ``read_marker`` must accept the marker."""
    return "sha256" in json.loads((folder / COMPLETE).read_text())


def find_size_fault(folder: Path) -> str | None:
    """Return what is wrong with the names and sizes of a checkpoint's files; None: nothing."""
    try:
        manifest = read_marker(folder)
    except ValueError as error:
        return str(error)
    for name, (size, _) in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        found = path.stat().st_size
        if found != size:
            return f"{path} has {found} bytes, and had {size} when it was written"
    for path in files_of(folder):
        if path.is_symlink():
            return f"{path} is a link; put the file that it names there instead (cp -rL does this for a folder)"
        if path.relative_to(folder).as_posix() not in manifest:
            return f"{path} does not belong to it, {COMPLETE} does not name it; move it out of the folder"
    return None


def find_fault(folder: Path, rank: int, num_ranks: int) -> str | None:
    """Return what is wrong with a checkpoint's names and sizes, or with the contents of this rank's share; None: nothing."""
    fault = find_size_fault(folder)
    if fault is not None:
        return fault
    manifest = read_marker(folder)
    for name in sorted(manifest)[rank::num_ranks]:
        if file_digest(folder / name, fsync=False)[1] != manifest[name][1]:
            return f"{folder / name} has other contents than were written (CRC-32)"
    return None


def write_text(path: Path, text: str) -> None:
    """Write a small file. A reader sees all of it or none, also after a crash of the machine."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def fsync_dir(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(manifest: Mapping[str, tuple[int, int]]) -> str:
    """Return the SHA-256 of the list of files, whatever its order."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _is_inside(name: str) -> bool:
    """Return whether a name of the manifest stays in the folder: relative, and without ".."."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.as_posix() == name and name not in (".", COMPLETE)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()

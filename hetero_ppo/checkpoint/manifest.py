"""What a checkpoint consists of: the size and CRC-32 of every file, written last, and checked before anything is read.

Checksums find what a disk or a copy did to the files. They do not prove who wrote them: reading a checkpoint must be safe without them
(``engines/role_reading.py``).
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

#: The marker of a complete checkpoint; it holds the manifest.
COMPLETE = "COMPLETE"
#: Bytes read at a time.
BLOCK = 1 << 22


def files_of(folder: Path) -> list[Path]:
    """All files of a checkpoint but the marker, in the order of their names."""
    return sorted(path for path in folder.rglob("*") if path != folder / COMPLETE and not _is_folder(path))


def look_at(path: Path, *, settle: bool) -> tuple[int, int]:
    """Size in bytes and CRC-32 of a file.

    Args:
        path: of the file.
        settle: wait until what was written is on the disk.
    """
    size, crc = 0, 0
    with path.open("rb") as file:
        if settle:
            os.fsync(file.fileno())
        while block := file.read(BLOCK):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return size, crc


def look_at_share(folder: Path, rank: int, num_ranks: int, *, settle: bool) -> dict[str, tuple[int, int]]:
    """Path in the folder -> size and CRC-32, of the files that fall to this rank."""
    mine = files_of(folder)[rank::num_ranks]
    return {str(path.relative_to(folder)): look_at(path, settle=settle) for path in mine}


def write_marker(folder: Path, manifest: dict[str, tuple[int, int]]) -> None:
    """Make the checkpoint complete."""
    write_text(folder / COMPLETE, json.dumps({"files": manifest, "sha256": _digest(manifest)}))
    for inner in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        settle_folder(inner)


def read_marker(folder: Path) -> dict[str, tuple[int, int]]:
    """The manifest.

    Raises:
        ValueError: the marker is not what ``write_marker`` writes, or names a file outside of the folder.
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
            f"{path} names {outside[0]!r}, which is not a file of the checkpoint: do not use what wrote this list"
        )
    return manifest


def has_own_checksum(folder: Path) -> bool:
    """Whether the marker has a checksum of itself; older versions wrote none. For a marker that ``read_marker`` accepts."""
    return "sha256" in json.loads((folder / COMPLETE).read_text())


def find_size_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint by the names and sizes of its files alone; None: nothing."""
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
            return f"{path} is a link; put what it names there instead (cp -rL copies a folder so)"
        if path.relative_to(folder).as_posix() not in manifest:
            return f"{path} does not belong to it, {COMPLETE} does not name it; move it out of the folder"
    return None


def find_fault(folder: Path, rank: int, num_ranks: int) -> str | None:
    """``find_size_fault``, and this rank's share of the contents."""
    fault = find_size_fault(folder)
    if fault is not None:
        return fault
    manifest = read_marker(folder)
    for name in sorted(manifest)[rank::num_ranks]:
        if look_at(folder / name, settle=False)[1] != manifest[name][1]:
            return f"{folder / name} has other contents than were written (CRC-32)"
    return None


def write_text(path: Path, text: str) -> None:
    """Write a small file; a reader sees all of it or none, also after a crash of the machine."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)


def settle_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(manifest: Mapping[str, tuple[int, int]]) -> str:
    """SHA-256 of the list of files, in whatever order it is."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _is_inside(name: str) -> bool:
    """Whether a name of the manifest stays in the folder: relative, and without a step up."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.as_posix() == name and name not in (".", COMPLETE)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()

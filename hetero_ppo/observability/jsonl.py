"""Files with one JSON object a line that a run appends to, and that a kill may cut in the middle of a line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def whole_lines(path: Path) -> list[str]:
    """Return the lines of a file, without a last one that a killed run has cut, or that a running one is just writing.

    Args:
        path: Of the file.

    Raises:
        ValueError: The file is not UTF-8.
    """
    *whole, last = path.read_bytes().split(b"\n")
    if last and _parse(last) is not None:  # written by hand, without an end of the line
        whole.append(last)
    return [line.decode("utf-8") for line in whole]


@dataclass(frozen=True)
class Cut:
    """What was taken out of a file."""

    num_dropped: int  # records
    is_torn: bool  # the last line had no end
    damaged: list[int]  # numbers of lines that are no records

    def describe(self, name: str, what: str) -> str | None:
        """Return it in words; None when nothing was taken out.

        Args:
            name: Of the file.
            what: Of the dropped records.
        """
        parts = [f"{self.num_dropped} {what} removed"] if self.num_dropped else []
        parts += ["a last line that a kill had cut removed"] if self.is_torn else []
        parts += [f"damaged lines removed: {', '.join(map(str, self.damaged))}"] if self.damaged else []
        return f"{name}: {', '.join(parts)}" if parts else None


def cut(path: Path, keep: Callable[[dict[str, Any]], bool]) -> Cut:
    """Rewrite a file with the records that are to stay; a reader sees the old file or the new one.

    Args:
        path: Of the file.
        keep: Says of a record whether it stays.
    """
    *whole, last = path.read_bytes().split(b"\n")
    if last and _parse(last) is not None:
        whole, last = [*whole, last], b""
    kept, damaged, num_dropped = [], [], 0
    for number, line in enumerate(whole, start=1):
        record = _parse(line)
        if record is None:
            damaged.append(number)
        elif keep(record):
            kept.append(line)
        else:
            num_dropped += 1
    found = Cut(num_dropped, bool(last), damaged)
    if found != Cut(0, False, []):
        write_whole(path, b"".join(line + b"\n" for line in kept))
    return found


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file that is there as a whole or not at all, also after a kill or a crash of the machine."""
    beside = path.with_name(f".{path.name}.partial")
    with beside.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None

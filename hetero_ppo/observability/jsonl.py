"""Files with one JSON object per line that a run appends to, and that a kill may cut in the middle of a line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def whole_lines(path: Path) -> list[str]:
    """Return the complete lines of a file. A last line without an end is left out: a killed run has cut it, or a running one is writing it.

    Args:
        path: File to read.

    Raises:
        ValueError: The file is not UTF-8.
    """
    *whole, last = path.read_bytes().split(b"\n")
    if last and _parse(last) is not None:  # a file edited by hand may lack the last newline
        whole.append(last)
    return [line.decode("utf-8") for line in whole]


@dataclass(frozen=True)
class CutReport:
    """Report on the lines that were removed from a file."""

    num_dropped: int  # records that were removed
    is_torn: bool  # True: the last line had no end
    damaged: list[int]  # numbers of lines that are not records

    def describe(self, name: str, what: str) -> str | None:
        """Describe in words what was removed; None if nothing was.

        Args:
            name: Name of the file.
            what: Description of the removed records.
        """
        parts = [f"{self.num_dropped} {what} removed"] if self.num_dropped else []
        parts += ["a last line that a kill had cut removed"] if self.is_torn else []
        parts += [f"damaged lines removed: {', '.join(map(str, self.damaged))}"] if self.damaged else []
        return f"{name}: {', '.join(parts)}" if parts else None


def cut(path: Path, keep: Callable[[dict[str, Any]], bool]) -> CutReport:
    """Rewrite a file with the records that ``keep`` accepts. A reader sees the old file or the new one.

    Args:
        path: File to rewrite.
        keep: Function that returns whether a record stays.
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
    found = CutReport(num_dropped, bool(last), damaged)
    if found != CutReport(0, False, []):
        write_whole(path, b"".join(line + b"\n" for line in kept))
    return found


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file as a whole: a reader never sees a part of it, also after a kill or a crash of the machine."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None

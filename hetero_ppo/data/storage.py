"""Examples stored in a file: a process keeps the offset of each one, and reads an example when it is asked for.

A Python list of ids takes eight bytes a token, and as many again for the texts. Here a token takes two or four bytes, and the texts are
JSON. All of it lies in the system's page cache, which the processes of a node share and which shrinks when memory is short.
"""

from __future__ import annotations

import json
import os
import weakref
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar, overload

import numpy

ROWS_FILE = "rows.bin"
OFFSETS_FILE = "offsets.bin"
#: Largest value that fits into two bytes.
_TWO_BYTES = 2**16 - 1

E = TypeVar("E")


class Codec(Protocol[E]):
    """Conversion of an example to lists of non-negative integers and a JSON value, and back."""

    num_lists: int

    def pack(self, example: E) -> tuple[Sequence[Sequence[int]], Any]:
        """Return ``num_lists`` lists, and a record of the other values; None if there are none."""

    def unpack(self, lists: list[list[int]], record: Any) -> E:
        """Build the example from its lists and its record."""


class ExampleWriter(Generic[E]):
    """Writer of the files that ``StoredExamples`` reads. Use it as a context manager."""

    def __init__(self, folder: Path, codec: Codec[E]) -> None:
        """Open the files.

        Args:
            folder: Private folder of the run.
            codec: Codec of the kind of example.
        """
        self._codec = codec
        self._folder = folder
        self._rows = (folder / ROWS_FILE).open("wb")
        self._offsets = array("Q", [0])

    def append(self, example: E) -> None:
        """Write one example."""
        lists, record = self._codec.pack(example)
        wide = max((max(values, default=0) for values in lists), default=0) > _TWO_BYTES
        header = array("I", [wide, *map(len, lists)])
        parts = [header.tobytes(), *(array("I" if wide else "H", values).tobytes() for values in lists)]
        if record is not None:
            parts.append(json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode())
        self._offsets.append(self._offsets[-1] + self._rows.write(b"".join(parts)))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._rows.close()
        (self._folder / OFFSETS_FILE).write_bytes(self._offsets.tobytes())


class StoredExamples(Sequence[E]):
    """Examples in file order, each read when it is asked for. The files may be removed once this object exists."""

    def __init__(self, folder: Path, codec: Codec[E]) -> None:
        """Open the files.

        Args:
            folder: Folder that ``ExampleWriter`` wrote.
            codec: Codec that it used.
        """
        self._codec = codec
        self._file = os.open(folder / ROWS_FILE, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._offsets = numpy.memmap(folder / OFFSETS_FILE, dtype=numpy.uint64, mode="r")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> E: ...
    @overload
    def __getitem__(self, index: slice) -> list[E]: ...
    def __getitem__(self, index: int | slice) -> E | list[E]:
        if isinstance(index, slice):
            return [self._read(place) for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return self._read(index % len(self))

    def __iter__(self) -> Iterator[E]:
        return (self._read(place) for place in range(len(self)))

    def _read(self, place: int) -> E:
        start, end = int(self._offsets[place]), int(self._offsets[place + 1])
        content = os.pread(self._file, end - start, start)
        header = array("I")
        size = (1 + self._codec.num_lists) * header.itemsize
        header.frombytes(content[:size])
        wide, *lengths = header
        lists = []
        for length in lengths:
            values = array("I" if wide else "H")
            values.frombytes(content[size : size + length * values.itemsize])
            size += length * values.itemsize
            lists.append(values.tolist())
        return self._codec.unpack(lists, json.loads(content[size:]) if size < len(content) else None)

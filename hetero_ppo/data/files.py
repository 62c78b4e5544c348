"""Read the objects of JSONL and parquet files one after the other. Errors name file and line."""

from __future__ import annotations

import datetime
import decimal
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hetero_ppo.data.excerpts import excerpt
from hetero_ppo.data.strict_json import parse_json

if TYPE_CHECKING:
    import pyarrow

#: Number of rows of a parquet file that are in memory at a time.
PARQUET_ROWS = 1024

#: First bytes of files that often have a wrong name -> what the file is, and what to do.
SIGNATURES = {
    b"\x1f\x8b": "is compressed with gzip; unpack it (gunzip)",
    b"\x28\xb5\x2f\xfd": "is compressed with zstandard; unpack it (unzstd)",
    b"BZh": "is compressed with bzip2; unpack it (bunzip2)",
    b"\xfd7zXZ": "is compressed with xz; unpack it (unxz)",
    b"PK\x03\x04": "is a ZIP archive; unpack it",
    b"PAR1": "is a parquet file; give it a name that ends in .parquet",
    b"\xff\xfe": "is text in UTF-16; convert it to UTF-8",
    b"\xfe\xff": "is text in UTF-16; convert it to UTF-8",
    b"version https://git-lfs": "is a Git LFS pointer and not the data; run git lfs pull",
}


def read_objects(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line or row number from 1, object) of a ``.jsonl`` or ``.parquet`` file. Blank lines of a JSONL file are skipped.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The ending is unknown, the file is unreadable, or a line is not a JSON object in UTF-8.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"data file {path!r} does not exist (current folder: {os.getcwd()})")
    if not path.endswith((".jsonl", ".parquet")):
        raise ValueError(f"{path}: a data file ends in .jsonl (one JSON object per line) or .parquet")
    _check_signature(path)
    yield from _read_parquet(path) if path.endswith(".parquet") else _read_jsonl(path)


def _check_signature(path: str) -> None:
    with open(path, "rb") as file:
        start = file.read(32)
    for signature, what in SIGNATURES.items():
        if start.startswith(signature) and not (signature == b"PAR1" and path.endswith(".parquet")):
            raise ValueError(f"{path}: the file {what}")


def _read_jsonl(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that Windows editors write
            if line.strip():
                yield number, _parse_line(path, number, line)


def _parse_line(path: str, number: int, line: bytes) -> dict[str, Any]:
    place = f"{path}, line {number}"
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        around = line[max(error.start - 20, 0) : error.start + 20]
        shown = excerpt(around.decode("utf-8", errors="backslashreplace"))
        raise ValueError(f"{place}: not UTF-8 at byte {error.start + 1}: {shown}; convert the file to UTF-8") from error
    try:
        values = parse_json(text)
    except ValueError as error:
        raise ValueError(
            f"{place}: {error}: {excerpt(text)}; a .jsonl file has one JSON object on every line"
        ) from error
    if isinstance(values, dict):
        return values
    raise ValueError(f"{place}: expected a JSON object, got {type(values).__name__}: {excerpt(text)}")


def _read_parquet(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield objects as a JSONL file would have them (``_as_json``)."""
    # Imported here: it is large, and most runs read only JSONL.
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for values in _to_python(path, batch, number):
                    number += 1
                    yield number, {column: _as_json(value) for column, value in values.items()}
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file: {excerpt(str(error))}") from error


def _to_python(path: str, batch: pyarrow.RecordBatch, rows_before: int) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist(maps_as_pydicts="strict")
    except (UnicodeDecodeError, KeyError, ValueError):
        pass
    for row in range(batch.num_rows):  # find the value to name in the error
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                column[row].as_py(maps_as_pydicts="strict")
            except (UnicodeDecodeError, KeyError, ValueError) as error:
                raise ValueError(f"{path}, row {rows_before + row + 1}, field {name!r}: {error}") from error
    raise AssertionError("a batch cannot be read, and each of its values can")


def _as_json(value: Any) -> Any:
    """Convert a parquet value to its JSON form.

    A column of objects has the same keys in every row, with null where a row had none: null keys of nested objects are left out. Dates and
    times become ISO 8601 texts, and decimals become numbers. Values without a JSON form (bytes, durations, NaN) stay unchanged;
    ``Row.value`` refuses them where the field is used.
    """
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        exponent = value.as_tuple().exponent  # a letter for NaN and infinity
        return int(value) if isinstance(exponent, int) and exponent >= 0 else float(value)
    return value

"""Rows of JSONL and parquet files, and errors that name file, line and field."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import pyarrow
import pyarrow.parquet

#: One chat message: ``role``, ``content``, and whatever else the template reads.
Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")

#: Characters of a bad value that an error shows.
EXCERPT_LENGTH = 60


def excerpt(value: object) -> str:
    """The start of ``value`` on one line."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return text if len(text) <= EXCERPT_LENGTH else text[: EXCERPT_LENGTH - 3] + "..."


@dataclass(frozen=True)
class Row:
    """One example as it stands in its file."""

    path: str
    number: int  # line of a JSONL file, row of a parquet file; both from 1
    values: dict[str, Any]

    @property
    def place(self) -> str:
        return f"{self.path}, {'row' if self.path.endswith('.parquet') else 'line'} {self.number}"

    def error(self, field: str, problem: str) -> ValueError:
        """The error to raise about one field of this row."""
        return ValueError(f"{self.place}, field {field!r}: {problem}")

    def has(self, field: str) -> bool:
        """Whether the field is there; null, and what parquet stores for a missing value, is not."""
        return self.values.get(field) is not None

    def value(self, field: str) -> Any:
        """The field.

        Raises:
            ValueError: missing or null.
        """
        if not self.has(field):
            problem = "is null" if field in self.values else "is missing"
            fields = ", ".join(self.values) or "none"
            raise self.error(field, f"{problem}; the row has: {fields} (data.*_key says which field is which)")
        return self.values[field]

    def text(self, field: str) -> str:
        """A string with something in it.

        Raises:
            ValueError: missing, not a string, or blank.
        """
        value = self.value(field)
        if not isinstance(value, str):
            raise self.error(field, f"expected text, got {type(value).__name__}: {excerpt(value)}")
        if not value.strip():
            raise self.error(field, f"is empty: {value!r}")
        return value

    def messages(self, field: str) -> list[Message]:
        """A list of chat messages, each with a known role and non-empty text.

        Raises:
            ValueError: anything else.
        """
        value = self.value(field)
        if not isinstance(value, list) or not value:
            raise self.error(field, f"expected a list of messages, got {type(value).__name__}: {excerpt(value)}")
        return [self._message(field, position, message) for position, message in enumerate(value)]

    def _message(self, field: str, position: int, message: Any) -> Message:
        name = f"{field}[{position}]"
        if not isinstance(message, dict):
            raise self.error(name, f"expected an object with role and content, got {excerpt(message)}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise self.error(name, f"{key!r} has to be text, got {excerpt(message)}")
        if message["role"] not in ROLES:
            raise self.error(name, f"unknown role {message['role']!r}; known: {', '.join(ROLES)}")
        if not message["content"].strip():
            raise self.error(name, f"the {message['role']} message is empty")
        # parquet gives every message of a column the same keys, null where a message has none
        return {key: item for key, item in message.items() if item is not None}


def read_rows(path: str) -> list[Row]:
    """All rows of a ``.jsonl`` or ``.parquet`` file; blank lines of a JSONL file are skipped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown ending, unreadable file, a line that is not a JSON object in UTF-8, or no row at all.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"data file {path!r} does not exist (current folder: {os.getcwd()})")
    if path.endswith(".jsonl"):
        rows = _read_jsonl(path)
    elif path.endswith(".parquet"):
        rows = _read_parquet(path)
    else:
        raise ValueError(f"{path}: a data file ends in .jsonl (one JSON object per line) or .parquet")
    if not rows:
        raise ValueError(f"{path}: the file has no rows")
    return rows


def _read_jsonl(path: str) -> list[Row]:
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that Windows editors write
            if line.strip():
                rows.append(Row(path, number, _parse_line(path, number, line)))
    return rows


def _parse_line(path: str, number: int, line: bytes) -> dict[str, Any]:
    place = f"{path}, line {number}"
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        shown = excerpt(line.decode("utf-8", errors="backslashreplace"))
        raise ValueError(f"{place}: not UTF-8 at byte {error.start + 1}: {shown}; convert the file to UTF-8") from error
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{place}: not valid JSON ({error.msg} at column {error.colno}): {excerpt(text)}; "
            "a .jsonl file has one JSON object on every line"
        ) from error
    if isinstance(values, dict):
        return values
    raise ValueError(f"{place}: expected a JSON object, got {type(values).__name__}: {excerpt(text)}")


def _read_parquet(path: str) -> list[Row]:
    try:
        records = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable parquet file: {excerpt(str(error))}") from error
    return [Row(path, number, values) for number, values in enumerate(records, start=1)]

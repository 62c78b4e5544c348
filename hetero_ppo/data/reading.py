"""Rows of JSONL and parquet files, with errors that name file, line and field."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hetero_ppo.data.excerpts import excerpt
from hetero_ppo.data.files import read_objects
from hetero_ppo.data.strict_json import parse_json

#: One chat message: ``role``, ``content``, and any other keys that the template reads.
Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
#: Roles whose messages may be empty: a tool may have found nothing.
MAY_BE_EMPTY = ("system", "developer", "tool")
#: Keys of a message that decide whether SFT learns from it.
TURN_KEYS = ("weight", "train")
#: Keys that other trainers read for the same purpose.
FOREIGN_TURN_KEYS = ("training", "loss", "loss_weight", "loss_mask", "mask")


@dataclass
class FileFacts:
    """Facts about a file, collected while its rows are used."""

    path: str
    num_rows: int = 0
    #: Key -> number of rows where it is not null; nested keys with dots.
    columns: Counter[str] = field(default_factory=Counter)
    found: set[str] = field(default_factory=set)  # fields that were asked for and that some row had
    message_keys: set[str] = field(default_factory=set)  # keys of all messages that were used, except role and content

    def add(self, values: dict[str, Any]) -> None:
        """Count a row and its keys."""
        self.num_rows += 1
        self.columns.update(key for key, value in values.items() if value is not None)
        for key, value in values.items():
            if isinstance(value, dict):
                self.columns.update(f"{key}.{inner}" for inner, item in value.items() if item is not None)

    @property
    def unread_columns(self) -> list[str]:
        """Top-level keys that some row has and that nothing has asked for."""
        read = {name for found in self.found for name in (found, found.partition(".")[0])}
        return sorted(key for key in self.columns if "." not in key and key not in read)

    def known_keys(self, limit: int = 12) -> str:
        """List the keys that rows have, for error messages."""
        keys = sorted(self.columns)
        return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "") or "none"


@dataclass(frozen=True)
class Row:
    """One example, unchanged from its file."""

    path: str
    number: int  # line of a JSONL file, row of a parquet file; both from 1
    values: dict[str, Any]
    facts: FileFacts | None = None  # facts about its file
    index: int = 0  # number among all rows of the file, from 0

    @property
    def place(self) -> str:
        return f"{self.path}, {'row' if self.path.endswith('.parquet') else 'line'} {self.number}"

    def error(self, field: str, problem: str) -> ValueError:
        """Build the error to raise about one field of this row."""
        return ValueError(f"{self.place}, field {field!r}: {problem}")

    def get(self, field: str) -> Any:
        """Return the field, or None if it is missing or null. ``a.b`` is the key b of the object a, unless there is a key a.b.

        Raises:
            ValueError: The value has no JSON form.
        """
        value: Any = self.values.get(field)
        if field not in self.values:
            value = self.values
            for name in field.split("."):
                value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            if self.facts is not None:
                self.facts.found.add(field)
            if not isinstance(value, str) and self.path.endswith(".parquet"):
                self._check_is_json(field, value)
        return value

    def _check_is_json(self, field: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                self._check_is_json(f"{field}.{key}", item)
        elif isinstance(value, list):
            for position, item in enumerate(value):
                self._check_is_json(f"{field}[{position}]", item)
        elif isinstance(value, float) and not math.isfinite(value):
            raise self.error(field, f"is {value}; a missing value has to be null")
        elif not isinstance(value, (str, int, float, bool, type(None))):
            raise self.error(
                field, f"is of the type {type(value).__name__}, which JSON does not have; store text or a number"
            )

    def has(self, field: str) -> bool:
        """Return whether the field is present. Null, which parquet stores for a missing value, counts as missing."""
        return self.get(field) is not None

    def value(self, field: str) -> Any:
        """Return the field.

        Raises:
            ValueError: The field is missing or null.
        """
        value = self.get(field)
        if value is None:
            problem = "is null" if field in self.values else "is missing"
            fields = ", ".join(self.values) or "none"
            raise self.error(field, f"{problem}; the row has: {fields} (data.*_key says which field is which)")
        return value

    def text(self, field: str) -> str:
        """Return a string that is not blank.

        Raises:
            ValueError: The field is missing, not a string, or blank.
        """
        value = self.value(field)
        if not isinstance(value, str):
            raise self.error(field, f"expected text, got {type(value).__name__}: {excerpt(value)}")
        if not value.strip():
            raise self.error(field, f"is empty: {value!r}")
        return value

    def tools(self, field: str) -> list[dict[str, Any]] | None:
        """Return the tools that the messages may call, stored as a list of objects or as its JSON text; None without any.

        Raises:
            ValueError: The field holds anything else.
        """
        value = self.get(field)
        if isinstance(value, str):
            try:
                value = parse_json(value) if value.strip() else None
            except ValueError as error:
                raise self.error(field, str(error)) from error
        if value is None or value == []:
            return None
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            raise self.error(field, f"expected a list of tools, each an object (JSON schema), got {excerpt(value)}")
        return value

    def messages(self, field: str, *, with_turn_keys: bool = False) -> list[Message]:
        """Return a list of chat messages, each with a known role and text.

        Args:
            field: Key of the list.
            with_turn_keys: Whether messages may say if SFT learns from them (``TURN_KEYS``).

        Raises:
            ValueError: The field holds anything else.
        """
        value = self.value(field)
        if not isinstance(value, list) or not value:
            raise self.error(field, f"expected a list of messages, got {type(value).__name__}: {excerpt(value)}")
        return [self._message(field, position, message, with_turn_keys) for position, message in enumerate(value)]

    def _message(self, field: str, position: int, message: Any, with_turn_keys: bool) -> Message:
        name = f"{field}[{position}]"
        if not isinstance(message, dict):
            raise self.error(name, f"expected an object with role and content, got {excerpt(message)}")
        # parquet gives every message of a column the same keys, with null where a message has none
        message = {key: item for key, item in message.items() if item is not None}
        calls_tools = message.get("role") == "assistant" and bool(message.get("tool_calls"))
        if calls_tools:
            message = {"content": "", **message}  # APIs write null
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise self.error(name, f"{key!r} has to be text, got {excerpt(message)}")
        if message["role"] not in ROLES:
            raise self.error(name, f"unknown role {message['role']!r}; known: {', '.join(ROLES)}")
        self._check_turn_keys(name, message, with_turn_keys)
        may_be_empty = calls_tools or message["role"] in MAY_BE_EMPTY or (with_turn_keys and not is_learned(message))
        if not message["content"].strip() and not may_be_empty:
            raise self.error(name, f"the {message['role']} message is empty")
        if self.facts is not None:
            self.facts.message_keys.update(message.keys() - {"role", "content", *TURN_KEYS})
        return message

    def _check_turn_keys(self, name: str, message: Message, allowed: bool) -> None:
        for key in FOREIGN_TURN_KEYS:
            if key in message:
                raise self.error(
                    f"{name}.{key}", "is not read; SFT leaves a turn out of the loss with weight 0 or train false"
                )
        for key in TURN_KEYS:
            if key not in message:
                continue
            value = message[key]
            if not allowed:
                raise self.error(
                    f"{name}.{key}", "would not be used: SFT alone learns from turns of a conversation; leave it out"
                )
            if value not in (0, 1) or not isinstance(value, (bool, int, float)):
                raise self.error(
                    f"{name}.{key}", f"is {excerpt(value)}; a turn is in the loss (1, true) or not (0, false)"
                )
            if value and message["role"] != "assistant":
                raise self.error(f"{name}.{key}", f"is {excerpt(value)}; the loss is on assistant messages alone")
        if len({bool(message[key]) for key in TURN_KEYS if key in message}) > 1:
            raise self.error(name, f"weight {message['weight']} and train {message['train']} contradict each other")


def is_learned(message: Message) -> bool:
    """Return whether SFT learns from an assistant message: neither ``weight`` nor ``train`` excludes it."""
    return all(message.get(key, 1) for key in TURN_KEYS)


def iter_rows(path: str) -> Iterator[Row]:
    """Yield the rows of a ``.jsonl`` or ``.parquet`` file one by one. Blank lines of a JSONL file are skipped.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The ending is unknown, the file is unreadable, a line is not a JSON object in UTF-8, or there is no row.
    """
    facts = FileFacts(path)
    for number, values in read_objects(path):
        facts.add(values)
        yield Row(path, number, values, facts, facts.num_rows - 1)
    if facts.num_rows == 0:
        raise ValueError(f"{path}: the file has no rows")


def read_rows(path: str) -> list[Row]:
    """Return all rows of ``iter_rows``."""
    return list(iter_rows(path))

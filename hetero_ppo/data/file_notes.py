"""Lines to print about what a whole data file has and lacks, and checks that it fits the options."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from hetero_ppo.config.schema import DataConfig, PromptDataConfig
from hetero_ppo.data.reading import FileFacts

#: Keys that a template need not read: they describe a message but are not its content.
SILENT_MESSAGE_KEYS = ("id", "name", "timestamp")


class LabelTypes:
    """Counter of the types of the labels in a file of prompts."""

    def __init__(self, data: PromptDataConfig) -> None:
        """Count for one file.

        Args:
            data: Data section, with the names of the fields.
        """
        self.key = data.label_key
        self._types: Counter[str] = Counter()

    def add(self, labels: Iterable[Any]) -> None:
        """Count labels; None stands for a row without one."""
        self._types.update(type(label).__name__ for label in labels)

    def notes(self, facts: FileFacts) -> list[str]:
        """Return lines about rows without a label and labels of several types."""
        missing = self._types["NoneType"]
        types = {name: count for name, count in sorted(self._types.items()) if name != "NoneType"}
        about = f"{facts.path}: label {self.key!r} (data.label_key)"
        if not types:
            return [f"{about}: no row has one; functions get None"]
        lines = []
        if missing:
            lines.append(
                f"{about}: {missing} of {missing + sum(types.values())} rows have none; functions get None for these"
            )
        if len(types) > 1 and set(types) != {"int", "float"}:
            lines.append(
                f"{about}: of several types: {', '.join(f'{name} in {count} rows' for name, count in types.items())}"
            )
        return lines


def file_notes(facts: FileFacts, data: DataConfig, keys: Sequence[str], template: str | None) -> list[str]:
    """Return lines about fields of the file that nothing reads.

    Args:
        facts: Facts about the file.
        data: Data section, with the names of the fields.
        keys: Names of the options of ``data`` that name the fields of this kind of file.
        template: Chat template of the run.

    Raises:
        ValueError: An option names a field that no row has.
    """
    defaults = {option.name: option.default for option in dataclasses.fields(data)}
    for key in keys:
        name = getattr(data, key)
        if name != defaults[key] and name not in facts.found:
            raise ValueError(
                f"{facts.path}: data.{key}={name}: none of the {facts.num_rows} rows has a field {name!r} that is used; "
                f"rows have: {facts.known_keys()}"
            )
    lines = []
    if facts.unread_columns:
        lines.append(f"{facts.path}: fields that are not read: {', '.join(facts.unread_columns)}")
    words = set(re.findall(r"\w+", template or ""))
    unread = sorted(key for key in facts.message_keys if key not in words and key not in SILENT_MESSAGE_KEYS)
    if unread and template is not None:
        lines.append(f"{facts.path}: keys of messages that the chat template does not read: {', '.join(unread)}")
    return lines

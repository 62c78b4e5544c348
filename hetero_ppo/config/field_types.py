"""Read the annotated types of the schema's fields: sections, lists of sections, choices, and what may be null."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from enum import Enum
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


@cache
def _hints_of(section: Hashable) -> dict[str, Any]:
    return get_type_hints(section)


def hints_of(section: type) -> dict[str, Any]:
    """Return field -> annotated type of a section's class, inherited fields included."""
    return _hints_of(section)


def without_null(hint: Any) -> Any:
    """Return the type of a field without its ``None``."""
    if get_origin(hint) in (Union, UnionType) and type(None) in get_args(hint):
        return next(arg for arg in get_args(hint) if arg is not type(None))
    return hint


def is_optional(hint: Any) -> bool:
    """Return whether a field of this type may be null."""
    return without_null(hint) is not hint


def section_class(hint: Any) -> type | None:
    """Return the dataclass of a section, or None for a plain field."""
    plain = without_null(hint)
    return plain if isinstance(plain, type) and dataclasses.is_dataclass(plain) else None


def item_class(hint: Any) -> type | None:
    """Return the dataclass of the items of a list of sections, or None for every other field."""
    plain = without_null(hint)
    return section_class(get_args(plain)[0]) if get_origin(plain) is list else None


def enum_choices(hint: Any) -> list[str]:
    """Return the names of the members of an enum field; none for other fields."""
    plain = without_null(hint)
    return [member.name for member in plain] if isinstance(plain, type) and issubclass(plain, Enum) else []

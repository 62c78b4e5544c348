"""Check the bounds that options declare in their metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from omegaconf import MISSING

from hetero_ppo.config.field_types import hints_of, is_optional
from hetero_ppo.config.schema.option import PLAIN, option_of


def check_bounds(config: Any) -> None:
    """Raise for the first number or text that its option does not allow.

    Args:
        config: Dataclass of a section, or of a whole configuration.

    Raises:
        ValueError: It names the field, the value, what is allowed, and what the option means.
    """
    for name, section, field in _options(config, ""):
        value, documented = getattr(section, field.name), option_of(field)
        if value == MISSING:
            continue  # ``load_config`` asks for it
        values = value if isinstance(value, list) else [value]
        if all(documented.bounds.allow(one) for one in values if isinstance(one, (int, float, str))):
            continue
        unit = "" if documented.unit in (None, PLAIN) else f" ({documented.unit})"
        null = ", or null" if is_optional(hints_of(type(section))[field.name]) else ""
        raise ValueError(
            f"{name}={value}: allowed: {documented.bounds.describe()}{unit}{null}. Meaning: {documented.text}"
        )


def _options(section: Any, prefix: str) -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """Yield (dotted name, section, field) of every option below a section; items of lists are numbered."""
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _options(value, f"{name}.")
        elif isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
            for number, item in enumerate(value):
                yield from _options(item, f"{name}.{number}.")
        else:
            yield name, section, field

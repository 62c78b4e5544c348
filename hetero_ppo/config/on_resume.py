"""Find out what happens to an option that has another value when a run resumes from a checkpoint.

Each option has its rule in its metadata. The rule of a section decides for all fields below it; ``OnResume.section`` leaves the
decision to them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any, get_args

from hetero_ppo.config.field_types import hints_of, item_class, section_class
from hetero_ppo.config.schema import TrainedRoleConfig
from hetero_ppo.config.schema.option import OnResume, option_of


def rule_of(schema_class: type, field: str) -> OnResume | None:
    """Return what happens to a change of this field; None for a field that the schema does not have.

    Args:
        schema_class: Class of the whole configuration.
        field: Dotted name; the items of a list of sections are numbered.
    """
    section, trained = schema_class, False
    parts = field.split(".")
    for depth, name in enumerate(parts):
        if name.isdecimal() and depth:
            continue
        field_of = {one.name: one for one in dataclasses.fields(section)}
        if name not in field_of:
            return None
        rule, hint = option_of(field_of[name]).resume, hints_of(section)[name]
        assert rule is not None, f"{field}: its section has a rule for all its fields"
        inner = section_class(hint) or item_class(hint)
        if rule is not OnResume.section:
            return _of_role(rule, trained)
        assert inner is not None, f"{field}: OnResume.section is for sections"
        section, trained = inner, trained or issubclass(inner, TrainedRoleConfig)
    return OnResume.objective  # the section itself: it is there in one configuration and not in the other


def _of_role(rule: OnResume, trained: bool) -> OnResume:
    if rule is OnResume.weights:
        return OnResume.no_effect if trained else OnResume.content
    if rule is OnResume.dtype:
        return OnResume.form if trained else OnResume.objective
    return rule


def leaves(values: dict[str, Any], section: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted field, value) of a configuration's plain values; an optional section that is not there gives None.

    Args:
        values: Values of a YAML file. Keys that the schema does not know are leaves too.
        section: Class of these values.
        prefix: Dotted name of the section, with a dot at the end.
    """
    hints = hints_of(section)
    for name, value in values.items():
        field = f"{prefix}{name}"
        hint = hints.get(name)
        inner, item = (None, None) if hint is None else (section_class(hint), item_class(hint))
        if inner is not None and isinstance(value, dict):
            yield from leaves(value, inner, f"{field}.")
        elif item is not None and isinstance(value, list):
            for number, one in enumerate(value):
                yield from leaves(one, item, f"{field}.{number}.")
        else:
            yield field, value


def is_named(field: str, names: Collection[str]) -> bool:
    """Return whether a field, or a section that it is in, is among ``names``."""
    parts = field.split(".")
    return any(".".join(parts[:depth]) in names for depth in range(1, len(parts) + 1))


def optional_sections(values: dict[str, Any], section: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the optional sections, and of the items of lists of sections, that are there.

    Args:
        values: Values of a YAML file.
        section: Class of these values.
        prefix: Dotted name of the section, with a dot at the end.
    """
    for name, hint in hints_of(section).items():
        value, inner, item = values.get(name), section_class(hint), item_class(hint)
        if inner is not None and isinstance(value, dict):
            if type(None) in get_args(hint):
                yield f"{prefix}{name}"
            yield from optional_sections(value, inner, f"{prefix}{name}.")
        elif item is not None and isinstance(value, list):
            for number, one in enumerate(value):
                yield f"{prefix}{name}.{number}"
                yield from optional_sections(one, item, f"{prefix}{name}.{number}.")

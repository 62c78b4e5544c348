"""What differs between the configuration of a checkpoint and that of the run that goes on from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, get_type_hints

import yaml
from omegaconf import MISSING

from hetero_ppo.config.load import LoadedConfig, item_class, section_class
from hetero_ppo.config.on_resume import OnResume, leaves, rule_of
from hetero_ppo.config.redact import redact
from hetero_ppo.config.render import render_yaml
from hetero_ppo.config.schema import SCHEMAS


class _Absent:
    """The value of a field that a configuration does not have."""

    def __repr__(self) -> str:
        return "(not there)"


ABSENT = _Absent()


@dataclass(frozen=True)
class Change:
    """A field with another value than the checkpoint's."""

    field: str
    old: Any  # ABSENT: the checkpoint's configuration does not have the field
    new: Any  # ABSENT: this configuration does not have it
    rule: OnResume | None  # None: the field is not in the schema any more

    def describe(self) -> str:
        """Return field, old and new value, and what becomes of it."""
        rule = "no longer an option" if self.rule is None else self.rule.value
        return f"{self.field}: {_text(self.old)} -> {_text(self.new)} ({rule})"


def config_values(loaded: LoadedConfig) -> dict[str, Any]:
    """Return the values that ``config.yaml`` of this configuration would have."""
    return yaml.safe_load(redact(render_yaml(loaded)))


def compare(saved: dict[str, Any], loaded: LoadedConfig) -> list[Change]:
    """Return the fields that differ, in the order of the schema. Those of one start alone (``run.dir``) take no part.

    A field that is newer than the checkpoint, and has its default, does not differ.

    Args:
        saved: Values of the checkpoint's config.yaml, of the same kind.
        loaded: Configuration of this run.
    """
    schema_class = SCHEMAS[loaded.kind]
    old, new = (dict(leaves(values, schema_class)) for values in (saved, config_values(loaded)))
    changes = []
    for field in [*new, *(name for name in old if name not in new)]:
        change = Change(field, old.get(field, ABSENT), new.get(field, ABSENT), rule_of(schema_class, field))
        if change.old is ABSENT and change.new == _default(schema_class, field):
            continue
        if change.old != change.new and change.rule is not OnResume.start:
            changes.append(change)
    return changes


def is_named(field: str, names: Collection[str]) -> bool:
    """Whether a field, or a section that it is in, is among ``names``."""
    parts = field.split(".")
    return any(".".join(parts[:depth]) in names for depth in range(1, len(parts) + 1))


def _default(schema_class: type, field: str) -> Any:
    """Return a field's default as YAML has it; ABSENT where it has none."""
    section = schema_class
    *path, name = field.split(".")
    for part in path:
        if not part.isdecimal():
            hint = get_type_hints(section)[part]
            inner = section_class(hint) or item_class(hint)
            assert inner is not None, f"{field}: {part} is no section"
            section = inner
    (found,) = [one for one in dataclasses.fields(section) if one.name == name]
    if found.default_factory is not dataclasses.MISSING:
        value = found.default_factory()
    else:
        value = found.default
    if value is dataclasses.MISSING or value == MISSING or dataclasses.is_dataclass(value):
        return ABSENT
    return getattr(value, "name", value)


def _text(value: Any) -> str:
    return repr(value) if value is ABSENT else yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()

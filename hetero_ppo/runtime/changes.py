"""Compare the configuration of a checkpoint with that of the run that continues from it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import Any

import yaml
from omegaconf import MISSING

from hetero_ppo.config.field_types import hints_of, item_class, section_class
from hetero_ppo.config.load import LoadedConfig
from hetero_ppo.config.on_resume import is_named, leaves, optional_sections, rule_of
from hetero_ppo.config.redact import redact
from hetero_ppo.config.render import render_yaml
from hetero_ppo.config.removed import without_removed
from hetero_ppo.config.schema import SCHEMAS
from hetero_ppo.config.schema.option import OnResume


class Presence(Enum):
    """Placeholder for a value when a field or section exists in only one of the two configurations."""

    absent = "(not there)"
    present = "(there)"


@dataclass(frozen=True)
class ConfigChange:
    """One field whose value differs from the checkpoint's."""

    field: str
    old: Any  # a value or a Presence
    new: Any
    rule: OnResume | None  # None: the schema no longer has the field

    def values(self) -> str:
        """Return field, old and new value."""
        return f"{self.field}: {_text(self.old)} -> {_text(self.new)}"

    def describe(self) -> str:
        """Return field, old and new value, and the effect of a change that is not refused."""
        if self.rule is OnResume.objective:
            return f"{self.values()} (allowed by checkpoint.allow_changes)"
        return f"{self.values()} ({'no longer an option' if self.rule is None else self.rule.value})"


def config_values(loaded: LoadedConfig) -> dict[str, Any]:
    """Return the values that this configuration's ``config.yaml`` would have."""
    return yaml.safe_load(redact(render_yaml(loaded)))


def compare(saved: dict[str, Any], values: dict[str, Any], kind: str) -> list[ConfigChange]:
    """Return the fields that differ, in the order of the schema. Fields that belong to one start only (``run.dir``) are not compared.

    A field that is newer than the checkpoint and has its default is never refused. It is listed if it affects the objective.

    Args:
        saved: Values of the checkpoint's config.yaml, of the same kind. Removed options that no run used are ignored.
        values: Values of this run (``config_values``).
        kind: Kind of both runs.
    """
    schema_class = SCHEMAS[kind]
    saved = without_removed(saved, schema_class)
    there, here = (set(optional_sections(one, schema_class)) for one in (saved, values))
    alone = {name for name in there ^ here if not any(name.startswith(f"{outer}.") for outer in there ^ here)}
    changes = []
    for name in sorted(alone):
        old, new = (Presence.present if name in side else Presence.absent for side in (there, here))
        changes.append(ConfigChange(name, old, new, rule_of(schema_class, name)))
    old_leaves, new_leaves = (
        {field: value for field, value in leaves(one, schema_class) if not is_named(field, alone)}
        for one in (saved, values)
    )
    for field in [*new_leaves, *(name for name in old_leaves if name not in new_leaves)]:
        old, new = (side.get(field, Presence.absent) for side in (old_leaves, new_leaves))
        rule = rule_of(schema_class, field)
        if old is Presence.absent and new == _default(schema_class, field):
            if rule is not OnResume.objective:
                continue
            rule = OnResume.newer
        if old != new and rule is not OnResume.start:
            changes.append(ConfigChange(field, old, new, rule))
    return changes


def _default(schema_class: type, field: str) -> Any:
    """Return a field's default as YAML has it; Presence.absent if it has none."""
    section = schema_class
    *path, name = field.split(".")
    for part in path:
        if not part.isdecimal():
            hint = hints_of(section)[part]
            inner = section_class(hint) or item_class(hint)
            assert inner is not None, f"{field}: {part} is no section"
            section = inner
    (found,) = [one for one in dataclasses.fields(section) if one.name == name]
    if found.default_factory is not dataclasses.MISSING:
        value = found.default_factory()
    else:
        value = found.default
    if value is dataclasses.MISSING or value == MISSING or dataclasses.is_dataclass(value):
        return Presence.absent
    return getattr(value, "name", value)


def _text(value: Any) -> str:
    return (
        value.value
        if isinstance(value, Presence)
        else yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    )

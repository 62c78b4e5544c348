"""YAML file and ``a.b=c`` overrides -> a typed configuration.

The YAML names its schema with ``kind: sft|rm|ppo`` and may hold ``${oc.env:VAR}`` and ``${actor.model.path}``-like
interpolations. A list of sections is written as a list, and its items are numbered from 0 in dotted names:
``reward_models.0.model.path``. An unknown key, a value of the wrong type and a missing mandatory field are each a ``ValueError`` that
says where it was written and what was meant. An option that earlier versions accepted for a kind of run which never used it is left out,
and ``removed`` names it; an override of one is an error.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_origin

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from hetero_ppo.config import schema
from hetero_ppo.config.field_types import enum_choices, hints_of, is_optional, item_class, section_class, without_null
from hetero_ppo.config.paths import expand_paths
from hetero_ppo.config.removed import removed_options, without_removed

AnyConfig = schema.SftConfig | schema.RmConfig | schema.PpoConfig


@dataclass(frozen=True)
class LoadedConfig:
    """A complete, resolved configuration and where it came from."""

    kind: str  # "sft", "rm" or "ppo"
    config: AnyConfig  # the dataclass of hetero_ppo.config.schema
    node: DictConfig  # the same, resolved, as an OmegaConf node
    source: str  # the YAML file
    origins: dict[str, str]  # dotted field -> where the user wrote it; fields at their default are not there
    removed: tuple[
        str, ...
    ] = ()  # lines about options of the file that no run of its kind ever used; they are left out


@dataclass(frozen=True)
class DraftConfig:
    """A configuration whose keys and types were checked, but which may lack mandatory fields or hold interpolations."""

    kind: str
    node: DictConfig
    source: str
    origins: dict[str, str]  # dotted field -> where the user wrote it
    removed: tuple[
        str, ...
    ] = ()  # lines about options of the file that no run of its kind ever used; they are left out

    def missing_fields(self) -> list[str]:
        """Return the mandatory fields that neither the file nor an override gives, sorted."""
        values: Any = OmegaConf.to_container(self.node, resolve=False)
        return sorted(_missing(values, ""))


def load_config(path: str, overrides: list[str]) -> LoadedConfig:
    """Read a YAML file, apply overrides in order, and resolve interpolations.

    Args:
        path: Path of the file.
        overrides: Fields with other values, each as ``a.b=c``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The YAML is bad, a key is unknown, a value has the wrong type, or a mandatory field or an environment variable is
            missing.
    """
    draft = load_draft(path, overrides)
    missing = draft.missing_fields()
    if missing:
        example = " ".join(f"{field}=..." for field in missing)
        raise ValueError(
            f"{path}: mandatory field{'s' if len(missing) > 1 else ''} not given: {', '.join(missing)}; "
            f"write them in the file, or add {example} on the command line"
        )
    _resolve(draft)
    expand_paths(draft.node)
    config: Any = OmegaConf.to_object(draft.node)  # an object of the kind's dataclass
    return LoadedConfig(draft.kind, config, draft.node, path, draft.origins, draft.removed)


def load_draft(path: str, overrides: list[str]) -> DraftConfig:
    """Read a YAML file and apply overrides, without resolving interpolations; mandatory fields may be missing.

    Args:
        path: Path of the file.
        overrides: Fields with other values, each as ``a.b=c``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The YAML is bad, a key is unknown, or a value has the wrong type.
    """
    values, lines = _read_yaml(path)
    kind = _kind(values, path)
    schema_class = schema.SCHEMAS[kind]
    node = OmegaConf.structured(schema_class)
    OmegaConf.set_struct(node, True)
    origins: dict[str, str] = {}

    def file_origin(field: str) -> str:
        return f"{path}:{lines[field]}"

    removed = tuple(
        f"{file_origin(field)}: {field} is no option of kind {kind}, remove it: {reason}"
        for field, reason in removed_options(values, schema_class)
    )
    values = without_removed(values, schema_class)

    for field, value, hint in _leaves(values, schema_class, "", file_origin, schema_class):
        _assign(node, schema_class, field, value, hint, file_origin(field))
        origins[field] = file_origin(field)
    for override in overrides:
        for field, value, hint in _override_leaves(override, schema_class):
            _assign(node, schema_class, field, value, hint, f"override {override!r}")
            if section_class(hint) is not None:  # null: what the file says below it is gone
                origins = {name: origin for name, origin in origins.items() if not name.startswith(f"{field}.")}
            origins[field] = f"override {override!r}"
    return DraftConfig(kind, node, path, origins, removed)


def _read_yaml(path: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the values of a file, and the line of every dotted key."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"config file {path!r} does not exist (current folder: {os.getcwd()})")
    try:
        with open(path, encoding="utf-8") as file:
            tree = yaml.compose(file, Loader=yaml.SafeLoader)
        values: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{path}: the top level has to be a mapping with `kind: sft`, `kind: rm` or `kind: ppo`")
    return values, dict(_key_lines(tree, ""))


def _key_lines(tree: yaml.Node, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(tree, yaml.MappingNode):
        for key, value in tree.value:
            field = f"{prefix}{key.value}"
            yield field, key.start_mark.line + 1
            yield from _key_lines(value, f"{field}.")
    elif isinstance(tree, yaml.SequenceNode):
        for number, item in enumerate(tree.value):
            yield f"{prefix}{number}", item.start_mark.line + 1
            yield from _key_lines(item, f"{prefix}{number}.")


def _missing(values: dict[Any, Any], prefix: str) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, (dict, list)):
            items = value if isinstance(value, dict) else dict(enumerate(value))
            yield from _missing(items, f"{prefix}{name}.")
        elif value == MISSING:
            yield prefix + name


def _kind(values: dict[str, Any], path: str) -> str:
    kinds = ", ".join(schema.SCHEMAS)
    if "kind" not in values:
        raise ValueError(f"{path}: no `kind` at the top level; add `kind:` with one of {kinds}")
    kind = values["kind"]
    if kind not in schema.SCHEMAS:
        raise ValueError(f"{path}: kind is {kind!r}; allowed: {kinds}")
    return kind


def _override_leaves(override: str, schema_class: type) -> Iterator[tuple[str, Any, Any]]:
    field, equals, text = override.partition("=")
    if not equals or not field or field.startswith("-"):
        raise ValueError(f"override {override!r}: overrides look like a.b=c, for example train.steps=10")
    if field == "kind":
        raise ValueError(f"override {override!r}: kind chooses the schema; change it in the file")
    try:
        whole: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
        value = whole["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"override {override!r}: {text!r} is not a YAML value; quote it if it is text") from error
    nested: Any = value
    for name in reversed(field.split(".")):
        nested = {name: nested}
    for removed, reason in removed_options(nested, schema_class):
        raise ValueError(f"override {override!r}: {removed} is no option of this kind of run, leave it out: {reason}")
    return _leaves(nested, schema_class, "", lambda _: f"override {override!r}", schema_class)


def _leaves(
    values: dict[Any, Any], section: type, prefix: str, origin: Callable[[str], str], schema_class: type
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted field, value, type) of everything that is set below a section, and refuse unknown keys."""
    hints = hints_of(section)
    for key, value in values.items():
        field = f"{prefix}{key}"
        if key not in hints:
            raise ValueError(
                f"{origin(field)}: unknown key {field!r}; {_suggestion(str(key), prefix, section, schema_class)}"
            )
        nested, item = section_class(hints[key]), item_class(hints[key])
        if nested is not None and isinstance(value, dict):
            if value:
                yield from _leaves(value, nested, f"{field}.", origin, schema_class)
        elif item is not None and isinstance(value, (dict, list)):
            yield from _item_leaves(value, item, field, origin, schema_class)
        elif isinstance(value, dict):
            raise ValueError(
                f"{origin(field)}: {field} takes one value ({_type_name(hints[key])}), not the keys {list(value)}"
            )
        else:
            yield field, value, hints[key]


def _item_leaves(
    values: dict[Any, Any] | list[Any], section: type, field: str, origin: Callable[[str], str], schema_class: type
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the same for a list of sections: for all of its items, or for those whose numbers an override gives."""
    if isinstance(values, list):
        yield field, [], list[section]  # type: ignore[valid-type]  # what was there goes
        values = dict(enumerate(values))
    for number, item in values.items():
        name = f"{field}.{number}"
        if not str(number).isdecimal():
            raise ValueError(f"{origin(field)}: {name}: items of the list {field} are numbered from 0")
        if not isinstance(item, dict) or not item:
            keys = ", ".join(hints_of(section))
            raise ValueError(f"{origin(field)}: {name} is a section with the keys {keys}; got the value {item!r}")
        yield from _leaves(item, section, f"{name}.", origin, schema_class)


def _suggestion(key: str, prefix: str, section: type, schema_class: type) -> str:
    """Return the nearest known key: a sibling, else the same or a similar name anywhere, else the list of siblings."""
    siblings = [field.name for field in dataclasses.fields(section)]
    near = difflib.get_close_matches(key, siblings, n=1)
    if near:
        return f"did you mean {prefix + near[0]!r}?"
    everywhere = list(all_fields(schema_class))
    same_name = [field for field in everywhere if field.split(".")[-1] == key]
    if same_name:
        return f"did you mean {' or '.join(repr(field) for field in same_name)}?"
    near = difflib.get_close_matches(prefix + key, everywhere, n=1)
    known = f"known keys {'under ' + prefix[:-1] if prefix else 'at the top level'}: {', '.join(siblings)}"
    return f"nearest: {near[0]!r}; {known}" if near else known


def all_fields(section: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all fields of a schema class that are no sections."""
    for name, hint in hints_of(section).items():
        nested = section_class(hint)
        if nested is None:
            yield prefix + name
        else:
            yield from all_fields(nested, f"{prefix}{name}.")


def _type_name(hint: Any) -> str:
    plain, optional, item = without_null(hint), is_optional(hint), item_class(hint)
    if enum_choices(hint):
        name = "one of " + ", ".join(enum_choices(hint))
    elif item is not None:
        name = f"a list of sections with the keys {', '.join(hints_of(item))}"
    elif get_origin(plain) is list:
        name = f"a list of {get_args(plain)[0].__name__}"
    else:
        name = {int: "an integer", float: "a number", str: "text", bool: "true or false"}[plain]
    return f"{name}, or null" if optional else name


def _assign(node: DictConfig, schema_class: type, field: str, value: Any, hint: Any, origin: str) -> None:
    section = section_class(hint)
    if section is not None:
        if value is not None or not is_optional(hint):
            keys = ", ".join(hints_of(section))
            raise ValueError(f"{origin}: {field} is a section with the keys {keys}; got the value {value!r}")
    elif not _is_acceptable(value, without_null(hint)):
        raise ValueError(f"{origin}: {field}: {value!r} is not allowed; allowed: {_type_name(hint)}")
    _open_sections(node, schema_class, field, origin)
    try:
        OmegaConf.update(node, field, value, merge=False)
    except OmegaConfBaseException as error:
        raise ValueError(f"{origin}: {field}: {value!r} is not allowed; allowed: {_type_name(hint)}") from error


def _is_acceptable(value: Any, plain: Any) -> bool:
    """Return whether a type takes a value. OmegaConf is less strict: it reads 3 as true and true as the text "True"."""
    interpolated = isinstance(value, str) and "${" in value
    if plain is bool and value is not None:
        return isinstance(value, bool) or interpolated
    if plain is str:
        return not isinstance(value, (bool, list))
    return True


def _open_sections(node: DictConfig, schema_class: type, field: str, origin: str) -> None:
    """Give a section that is None by default, or an item that is one more, its defaults before a field inside it is set."""
    section: type = schema_class
    parts = field.split(".")
    for depth, name in enumerate(parts[:-1], start=1):
        prefix = ".".join(parts[:depth])
        if name.isdecimal():  # an item of the list before it
            items = OmegaConf.select(node, ".".join(parts[: depth - 1]))
            if int(name) > len(items):
                raise ValueError(
                    f"{origin}: {field}: the list has {len(items)} items, the next one is number {len(items)}"
                )
            if int(name) == len(items):
                items.append(OmegaConf.structured(section))
            continue
        hint = hints_of(section)[name]
        item = item_class(hint)
        if item is not None:
            section = item
            continue
        nested = section_class(hint)
        assert nested is not None  # the field was found in it
        if OmegaConf.select(node, prefix) is None:
            OmegaConf.update(node, prefix, OmegaConf.structured(nested))
        section = nested


def _resolve(draft: DraftConfig) -> None:
    """Replace interpolations by their values, in place."""
    for field, origin in draft.origins.items():
        try:
            OmegaConf.select(draft.node, field)
        except InterpolationToMissingValueError as error:
            raise ValueError(f"{origin}: {field} refers to a field that has no value: {_first_line(error)}") from error
        except OmegaConfBaseException as error:
            raise ValueError(f"{origin}: {field} cannot be resolved: {_first_line(error)}") from error
    OmegaConf.resolve(draft.node)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]

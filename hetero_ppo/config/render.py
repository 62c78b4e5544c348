"""A configuration as YAML, each field with its documentation, unit and bounds."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import yaml
from omegaconf import OmegaConf

from hetero_ppo.config import schema
from hetero_ppo.config.redact import redact
from hetero_ppo.config.field_types import enum_choices, hints_of, item_class, section_class
from hetero_ppo.config.load import DraftConfig, LoadedConfig
from hetero_ppo.config.schema.option import option_of

#: Column of the comments, counted in characters.
COMMENT_COLUMN = 44


def render_yaml(config: LoadedConfig | DraftConfig) -> str:
    """Return all fields, defaults included, as YAML that ``load_config`` reads back; choices, documentation, units and bounds are comments.

    A draft is shown as it was written: mandatory fields that are missing are ``???``, interpolations stay.
    """
    values: Any = OmegaConf.to_container(config.node, resolve=False, enum_to_str=True)
    return "\n".join(_render_section(values, schema.SCHEMAS[config.kind], "")) + "\n"


def save_config(config: LoadedConfig, path: str) -> None:
    """Write the resolved configuration to ``path``, without secrets."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    partial = f"{path}.partial"  # a run that is killed here leaves the old file, or the new one
    with open(partial, "w", encoding="utf-8") as file:
        file.write(redact(render_yaml(config)))
    os.replace(partial, path)


def _render_section(values: dict[str, Any], section: type, indent: str) -> Iterator[str]:
    hints = hints_of(section)
    for field in dataclasses.fields(section):
        value = values[field.name]
        comment = _comment(field, hints[field.name])
        nested, item = section_class(hints[field.name]), item_class(hints[field.name])
        if isinstance(value, dict) and nested is not None:
            yield _with_comment(f"{indent}{field.name}:", comment)
            yield from _render_section(value, nested, indent + "  ")
        elif value and item is not None:
            yield _with_comment(f"{indent}{field.name}:", comment)
            for one in value:
                first, *rest = _render_section(one, item, indent + "    ")
                yield f"{indent}  - {first.lstrip()}"
                yield from rest
        else:
            text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=2**20)
            yield _with_comment(
                f"{indent}{field.name}: {text.removesuffix(chr(10)).removesuffix('...').rstrip()}", comment
            )


def _comment(field: dataclasses.Field[Any], hint: Any) -> str:
    choices = " | ".join(enum_choices(hint))
    text = option_of(field).describe()
    return f"{choices}; {text}" if choices else text


def _with_comment(line: str, comment: str) -> str:
    return f"{line:<{COMMENT_COLUMN}}  # {comment}"

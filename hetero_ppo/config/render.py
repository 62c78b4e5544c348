"""A configuration as YAML, each field with the comment that schema.py gives it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
from collections.abc import Iterator
from functools import cache
from typing import Any, get_type_hints

import yaml
from omegaconf import OmegaConf

from hetero_ppo.config import schema
from hetero_ppo.config.redact import redact
from hetero_ppo.config.load import DraftConfig, LoadedConfig, enum_choices, item_class, section_class

#: Column of the comments, counted in characters.
COMMENT_COLUMN = 44


def render_yaml(config: LoadedConfig | DraftConfig) -> str:
    """All fields, defaults included, as YAML that ``load_config`` reads back; units and choices as comments.

    A draft is shown as it was written: mandatory fields that are missing are ``???``, interpolations stay.
    """
    values = OmegaConf.to_container(config.node, resolve=False, enum_to_str=True)
    return "\n".join(_render_section(values, schema.SCHEMAS[config.kind], "")) + "\n"


def save_config(config: LoadedConfig, path: str) -> None:
    """Write the resolved configuration to ``path``, without secrets."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    partial = f"{path}.partial"  # a run that is killed here leaves the old file, or the new one
    with open(partial, "w", encoding="utf-8") as file:
        file.write(redact(render_yaml(config)))
    os.replace(partial, path)


def _render_section(values: dict[str, Any], section: type, indent: str) -> Iterator[str]:
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        value = values[field.name]
        comment = _comment(section, field.name, hints[field.name])
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


def _comment(section: type, name: str, hint: Any) -> str | None:
    choices = enum_choices(hint)
    parts = [" | ".join(choices)] if choices else []
    written = field_comments().get((section.__name__, name))
    if written is not None:
        parts.append(written.replace("None", "null"))
    return "; ".join(parts) if parts else None


def _with_comment(line: str, comment: str | None) -> str:
    return f"{line:<{COMMENT_COLUMN}}  # {comment}" if comment else line


@cache
def field_comments() -> dict[tuple[str, str], str]:
    """(class name, field name) -> the comment on the field's line in schema.py."""
    source = inspect.getsource(schema)
    lines = source.splitlines()
    comments = {}
    for statement in ast.parse(source).body:
        if not isinstance(statement, ast.ClassDef):
            continue
        for member in statement.body:
            if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
                _, marker, comment = lines[member.end_lineno - 1].partition("  # ")
                if marker:
                    comments[statement.name, member.target.id] = comment.strip()
    return comments

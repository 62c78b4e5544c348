"""Paths in a configuration: ``~`` is the user's home, shell variables are refused."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

#: Ends of the dotted names of all fields that hold a path, or a path and the name of a function.
PATH_FIELDS = (
    "run.dir",
    "data.train",
    "data.eval",
    "chat_template",
    "model.path",
    "model.tokenizer",
    "checkpoint.load",
    "train.replay_rollouts",
    "reward.function",
    "train.eval_function",
)
_SHELL_VARIABLE = re.compile(r"\$\{?[A-Za-z_]")


def expand_paths(node: DictConfig) -> None:
    """Replace a leading ``~`` in every field that holds a path, in place.

    Args:
        node: Resolved configuration.

    Raises:
        ValueError: A path holds a shell variable, or the home of an unknown user.
    """
    for field, value in _texts(OmegaConf.to_container(node), ""):
        if not any(field == name or field.endswith(f".{name}") for name in PATH_FIELDS):
            continue
        if _SHELL_VARIABLE.search(value):
            raise ValueError(
                f"{field}={value}: shell variables are not replaced in a path; write ${{oc.env:NAME}} for the variable NAME"
            )
        if value.startswith("~"):
            expanded = os.path.expanduser(value)
            if expanded == value:
                raise ValueError(f"{field}={value}: there is no such home folder; write the whole path")
            OmegaConf.update(node, field, expanded, merge=False)


def _texts(values: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted field, text) of every text below a section; items of lists are numbered."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for name, value in items:
        if isinstance(value, (dict, list)):
            yield from _texts(value, f"{prefix}{name}.")
        elif type(value) is str:
            yield f"{prefix}{name}", value

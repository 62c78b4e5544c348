"""Digests of a run's inputs: weights, tokenizer, template, data, reward function.

Every checkpoint holds them. A run that continues from it compares them with its own: a folder may have moved, but its contents may not
change unless ``checkpoint.allow_changes`` names the field.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from hetero_ppo.config.on_resume import is_named
from hetero_ppo.runtime.resume import Resume


@dataclass(frozen=True)
class Input:
    """One input of a run."""

    name: str  # field that names its location; the part in brackets if a field has several parts
    digest: str
    fields: tuple[str, ...]  # its contents may change if checkpoint.allow_changes has any of these


def differing(resume: Resume | None, inputs: Sequence[Input]) -> list[Input]:
    """Return the inputs whose contents differ from the checkpoint's. Inputs that the checkpoint does not list are skipped."""
    if resume is None or resume.inputs is None:
        return []
    return [one for one in inputs if resume.inputs.get(one.name, one.digest) != one.digest]


def check_inputs(resume: Resume | None, inputs: Sequence[Input]) -> list[str]:
    """Compare the inputs with those of the checkpoint that the run continues from. Return lines for the user.

    Args:
        resume: Checkpoint to compare with; None: there is none.
        inputs: Inputs of this run.

    Raises:
        ValueError: The contents of some inputs differ, and ``checkpoint.allow_changes`` does not name them.
    """
    if resume is None:
        return []
    unknown = [one.name for one in inputs if resume.inputs is None or one.name not in resume.inputs]
    lines = (
        [
            f"{resume.folder} has no digests of its inputs, or another version made them. Not compared: {', '.join(unknown)}"
        ]
        if unknown
        else []
    )
    changed = differing(resume, inputs)
    refused = [one for one in changed if not any(is_named(field, resume.allowed) for field in one.fields)]
    if refused:
        names = ", ".join(one.name for one in refused)
        fields = ",".join(dict.fromkeys(one.fields[0] for one in refused))
        raise ValueError(
            f"checkpoint.load: the checkpoint was made on other data or models: the content of {names} is not that of {resume.folder}. "
            f"Restore it, or, if the change is intended, set checkpoint.allow_changes=[{fields}]"
        )
    return lines + [f"checkpoint.allow_changes: the content of {one.name} is not the checkpoint's" for one in changed]


def function_digest(function: str) -> str:
    """Return a digest of a function's source file that ignores comments and layout.

    Args:
        function: ``package.module:name`` or ``path/to/file.py:name``.
    """
    module, _, name = function.rpartition(":")
    source = Path(module) if module.endswith(".py") else _source_of(module)
    digest = hashlib.sha256(name.encode())
    if source is not None and source.is_file():
        text = source.read_bytes()
        digest.update(ast.dump(ast.parse(text)).encode() if source.suffix == ".py" else text)
    return digest.hexdigest()


def _source_of(module: str) -> Path | None:
    """Return the file of a module without importing it or its packages. Only the processes that call the function import it."""
    places: Sequence[str] | None = [os.getcwd(), *sys.path]
    spec, name = None, ""
    for part in module.split("."):
        name = f"{name}.{part}".removeprefix(".")
        spec = None if places is None else PathFinder.find_spec(name, places)
        if spec is None:
            return None
        places = spec.submodule_search_locations
    return None if spec is None or spec.origin is None else Path(spec.origin)

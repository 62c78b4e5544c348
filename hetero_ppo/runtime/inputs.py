"""What a run is made from, by content: weights, tokenizer, template, data, reward function.

Every checkpoint holds the digests. A run that goes on from it compares them with its own: a folder may move, and what is in it may not
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
    """One part of what a run is made from."""

    name: str  # field that says where it is; with more in brackets where a field has several parts
    digest: str
    fields: tuple[str, ...]  # any of them in checkpoint.allow_changes allows another content


def differing(resume: Resume | None, inputs: Sequence[Input]) -> list[Input]:
    """Return those whose content is not the checkpoint's. What it does not say anything of is not among them."""
    if resume is None or resume.inputs is None:
        return []
    return [one for one in inputs if resume.inputs.get(one.name, one.digest) != one.digest]


def check_inputs(resume: Resume | None, inputs: Sequence[Input]) -> list[str]:
    """Compare the inputs with those of the checkpoint that the run goes on from; return lines for the user.

    Args:
        resume: None: there is nothing to compare with.
        inputs: Of this run.

    Raises:
        ValueError: Some have another content, and ``checkpoint.allow_changes`` does not name them.
    """
    if resume is None:
        return []
    unknown = [one.name for one in inputs if resume.inputs is None or one.name not in resume.inputs]
    said = (
        [
            f"{resume.folder} does not say what it was made from, or its version says it differently. Not compared: {', '.join(unknown)}"
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
            f"Give it back, or, where the change is meant, set checkpoint.allow_changes=[{fields}]"
        )
    return said + [f"checkpoint.allow_changes: the content of {one.name} is not the checkpoint's" for one in changed]


def function_digest(function: str) -> str:
    """Return a digest of a function's source file, in which comments and layout do not count.

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
    """Return the file of a module, without importing it or its packages: that is for the processes that call the function."""
    places: Sequence[str] | None = [os.getcwd(), *sys.path]
    spec, name = None, ""
    for part in module.split("."):
        name = f"{name}.{part}".removeprefix(".")
        spec = None if places is None else PathFinder.find_spec(name, places)
        if spec is None:
            return None
        places = spec.submodule_search_locations
    return None if spec is None or spec.origin is None else Path(spec.origin)

"""A checker of the words of the sources: how docstrings begin, texts of arguments, terms that this project does not use, names of classes."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: Verbs with which the docstring of a function may begin.
VERBS = frozenset(Path(__file__).with_name("verbs.txt").read_text(encoding="utf-8").split())
#: Terms that this project does not use -> what it writes instead.
GLOSSARY = {
    r"\bbeside (generation|another|the generator)\b": "during generation, concurrently with, in parallel with",
    r"\banew\b": "again, recomputed",
    r"\bwhat is said\b|\b(it|they|is|are) told\b": "logged, printed, reported",
    r"\bsettle_folder\b": "fsync_dir",
    r"\blook_at\b": "file_digest",
    r"\b_said_of\b": "describe",
    r"\b_obey\b": "handle_order",
    r"\bNotInTime\b": "TimeoutError",
    r"(?<![\"'.])\bbegun\b": "partial (a response), started (a run)",
    r"(?<![\"'.])\bwanted\b": "num_needed (rows), output_mask (tokens), is_target (residency)",
    r"\b(vLLM|rollout|inference|generation) engines?\b": "generator; an engine is the trainer's model of a role",
    r"\bgolden prompts?\b": "probe prompt",
    r"\bjudges?\b": "scorer, scores",
    r"\bthe house\b|\bhouse rules?\b|\broom for a turn\b": "package, module",
}
#: Words with which the text of an argument begins when it is a fragment, such as "of this process".
FRAGMENTS = {"of", "see", "as", "what", "whose", "that", "from", "in", "to", "with", "for", "by", "on"}
ARGUMENT = re.compile(r"^ {4}(\*{0,2}\w+): *(.*)$")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Documented:
    """A function with a docstring that has to begin with a verb: no property, no fixture and no test."""

    place: str  # file:line
    docstring: str

    @property
    def begins_with_a_verb(self) -> bool:
        """Return whether the first word is an imperative verb."""
        return re.split(r"[\s,.:;]", self.docstring, maxsplit=1)[0] in VERBS


def place_of(path: Path, line: int) -> str:
    """Return file and line, with the file as seen from the root of the project."""
    return f"{path.relative_to(ROOT).as_posix()}:{line}"


@functools.cache
def parse(path: Path) -> ast.Module:
    """Parse a source file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def docstrings(paths: Iterable[Path]) -> Iterator[tuple[Path, Function, str]]:
    """Yield every function that has a docstring, and the docstring."""
    for path in paths:
        for node in ast.walk(parse(path)):
            if isinstance(node, Function) and (text := ast.get_docstring(node)):
                yield path, node, text


def documented(paths: Iterable[Path]) -> Iterator[Documented]:
    """Yield the functions whose docstrings have to begin with a verb."""
    for path, node, text in docstrings(paths):
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        is_value = any(name.split(".")[-1] in ("property", "cached_property") for name in decorators)
        if not (is_value or node.name.startswith("test_") or any("fixture" in name for name in decorators)):
            yield Documented(place_of(path, node.lineno), text)


def argument_texts(docstring: str) -> Iterator[tuple[str, str]]:
    """Yield name and text of the arguments, attributes and errors that a docstring lists."""
    in_list = False
    for line in docstring.splitlines():
        if re.fullmatch(r"(Args|Attributes|Raises):", line):
            in_list = True
        elif line and not line.startswith(" "):
            in_list = False
        elif in_list and (found := ARGUMENT.match(line)):
            yield found[1], found[2]


def fragments(paths: Iterable[Path]) -> Iterator[str]:
    """Yield the texts of arguments that are no noun phrase with a capital letter, each with its place."""
    for path, node, docstring in docstrings(paths):
        for name, text in argument_texts(docstring):
            first = re.split(r"[\s,.:;]", text, maxsplit=1)[0]
            if first.lower() in FRAGMENTS or first[:1].islower():
                yield f"{place_of(path, node.lineno)}: {name}: {text}"


def unused_terms(paths: Iterable[Path]) -> Iterator[str]:
    """Yield the lines with a term of the glossary, each with its place and what to write instead."""
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            for pattern, instead in GLOSSARY.items():
                if re.search(pattern, line):
                    yield f"{place_of(path, number)}: write {instead}: {line.strip()}"


def classes(paths: Iterable[Path]) -> dict[str, list[str]]:
    """Return the places of all classes, by name."""
    found: dict[str, list[str]] = {}
    for path in paths:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(place_of(path, node.lineno))
    return found

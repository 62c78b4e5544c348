"""Names of metrics and phases: those that the code writes, and those that docs/metrics.md explains."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from hetero_ppo.reward.function_pool import FailureKind

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "metrics.md"

#: A name in the code, or on the page; ``*`` is the part that a run fills in.
NAME = re.compile(r"(?:[a-z_0-9]+|\*)(?:/[a-z_0-9*]+)+")
#: Strings of this form that are no metrics: sums that ``mean_metrics`` uses up, parts of a longer name, and keys of a store.
OTHERS = {"critic/returns", "critic/returns_sq", "critic/residual", "critic/residual_sq", "length/mean", "*/*"}
#: Names that the code puts together from a fixed list.
LISTS = {
    "memory/*_gib": ["memory/allocated_gib", "memory/reserved_gib", "memory/cached_gib"],
    "reward/function/num_*": [f"reward/function/num_{kind.value}" for kind in FailureKind],
    "reward/re_encoded/*/*": ["reward/re_encoded/*/length/mean", "reward/re_encoded/*/num_cut"],
}


def names_of_code() -> set[str]:
    """Return the names of all metrics that hetero_ppo can log."""
    found = {name for name in _keys_of_code() if NAME.fullmatch(name)} - OTHERS
    pairs = [f"eval/{name.removeprefix('rm/')}" for name in found if name.startswith("rm/")]
    lists = {**LISTS, "eval/*": pairs}
    assert lists.keys() <= found, f"no longer in the code: {lists.keys() - found}"
    return (found - lists.keys()).union(*lists.values())


def phases_of_code() -> set[str]:
    """Return the names that hetero_ppo gives to ``PhaseTimer.phase`` as they stand, without those of stages."""
    calls = (node for tree in _trees() for node in ast.walk(tree) if isinstance(node, ast.Call))
    timers = (call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "phase")
    return {name for call in timers for argument in call.args if (name := _text(argument)) is not None}


def names_of_page() -> set[str]:
    """Return the names of the page's tables, with ``*`` for what stands in angle brackets."""
    return {name for name in _first_cells() if NAME.fullmatch(name)} - phases_of_page()


def phases_of_page() -> set[str]:
    """Return the phases of the page's last table."""
    return set(_first_cells(PAGE.read_text(encoding="utf-8").partition("| phase |")[2]))


def matches_page(name: str) -> bool:
    """Return whether the page has a metric of this name, or a pattern that it follows."""
    patterns = (re.escape(known).replace(r"\*", "[a-z_0-9]+") for known in names_of_page())
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _first_cells(text: str | None = None) -> list[str]:
    """Return the code in the first cell of each row."""
    lines = (PAGE.read_text(encoding="utf-8") if text is None else text).splitlines()
    return [re.sub("<[a-z]+>", "*", cell) for line in lines for cell in re.findall(r"^\| `([^`]+)` \|", line)]


def _trees() -> Iterator[ast.Module]:
    for path in sorted((ROOT / "hetero_ppo").rglob("*.py")):
        yield ast.parse(path.read_text(encoding="utf-8"))


def _keys_of_code() -> Iterator[str]:
    """Yield the strings that are keys of dictionaries, constants, or results of functions."""
    for tree in _trees():
        for node in ast.walk(tree):
            for part in _named_parts(node):
                if (text := _text(part)) is not None:
                    yield text


def _named_parts(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Dict):
        return [key for key in node.keys if key is not None]
    if isinstance(node, ast.DictComp):
        return [node.key]
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
        return [node.slice]
    if isinstance(node, ast.Assign) and all(isinstance(target, ast.Name) for target in node.targets):
        return [node.value]
    if isinstance(node, ast.Return) and node.value is not None:
        return [node.value]
    return []


def _text(node: ast.expr) -> str | None:
    """Return a string of the code, with ``*`` for what an f-string fills in; None for another expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in node.values)
    return None

"""Files that a run writes are JSON as its standard has it."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import pytest

from hetero_ppo.observability.json_text import json_text

PACKAGE = Path(__file__).parents[2] / "hetero_ppo"
#: What writes metrics, scores, samples, rollouts, traces and plans. Other modules talk to Python alone.
WRITERS = sorted(
    path
    for folder in ("observability", "trainers", "memory", "reward", "rollout/replay.py")
    for path in ((PACKAGE / folder).rglob("*.py") if (PACKAGE / folder).is_dir() else [PACKAGE / folder])
    if path.name != "function_worker.py"  # its channel to the trainer
)


def test_a_number_that_is_not_finite_is_null() -> None:
    value = {"a": [1.5, math.nan, (math.inf,)], "b": {"c": -math.inf, "d": "NaN"}, "e": True}
    assert json.loads(json_text(value)) == {"a": [1.5, None, [None]], "b": {"c": None, "d": "NaN"}, "e": True}
    assert json_text({"ä": 1}, ensure_ascii=False, indent=1) == '{\n "ä": 1\n}'


@pytest.mark.parametrize("path", WRITERS, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_writer_lets_nan_through(path: Path) -> None:
    """``json_text``, or ``json.dumps(..., allow_nan=False)``; texts of error messages are cut and are no files."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump"):
            allows = next((keyword.value for keyword in node.keywords if keyword.arg == "allow_nan"), None)
            is_strict = isinstance(allows, ast.Constant) and allows.value is False
            is_excerpt = f"{ast.unparse(node)}[:" in ast.unparse(ast.parse(path.read_text(encoding="utf-8")))
            found += [] if is_strict or is_excerpt else [f"{path.name}:{node.lineno}"]
    assert found == []

"""Every file in configs/ is a configuration whose fields fit each other."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from hetero_ppo.config.checks import check_config
from hetero_ppo.config.derived import config_roles
from hetero_ppo.config.load import load_config, load_draft

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
#: Values for mandatory fields that a file leaves to the command line.
PLACEHOLDERS = {"data.train": "placeholder.jsonl", "data.eval": "placeholder.jsonl"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in re.findall(r"\$\{oc\.env:(\w+)\}", path.read_text(encoding="utf-8")):
        monkeypatch.setenv(variable, "placeholder.jsonl")
    draft = load_draft(str(path), [])
    assert path.parent.name == draft.kind, "configs/<kind>/ holds the files of that kind"
    fill = [f"{field}={PLACEHOLDERS.get(field, 'placeholder')}" for field in draft.missing_fields()]
    config = load_config(str(path), fill).config
    layouts = [role.parallel for role in config_roles(config).values()]
    check_config(config, math.lcm(*(one.tensor * one.pipeline * one.context for one in layouts)))

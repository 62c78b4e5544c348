"""The program that runs GPU checks: every check in a process of its own, results on the disk as they come."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.gpu import checks

ROOT = Path(__file__).resolve().parents[2]
FAKES = """
import os, signal, time
from tests.gpu.check_types import Check, Skip

def passes(cpu):
    return {"answer": 42, "cpu": cpu}

def fails(cpu):
    raise AssertionError("values differ")

def crashes(cpu):
    os.kill(os.getpid(), signal.SIGSEGV)

def hangs(cpu):
    if os.fork() == 0:
        time.sleep(600)
    time.sleep(600)

def skips(cpu):
    raise Skip("no such library")

CHECKS = [Check(f.__name__, "something", t, f) for f, t in ((passes, 60), (fails, 60), (crashes, 60), (hangs, 2), (skips, 60))]
CHECKS.append(Check("device", "something", 60, passes, on_cpu=False))
"""


def test_each_check_has_its_own_end(tmp_path: Path) -> None:
    (tmp_path / "fakes.py").write_text(FAKES)
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "tests.gpu.run_checks", "--checks", "fakes", "--cpu", "--out", str(out)]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=120, check=False)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["status"] for row in rows] == ["passed", "failed", "failed", "timeout", "skipped", "skipped"], (
        done.stderr
    )
    assert rows[0]["facts"] == {"answer": 42, "cpu": True} and rows[0]["machine"]["torch"]
    assert (
        "values differ" in rows[1]["output"]
        and "no such library" in rows[4]["output"]
        and "needs a GPU" in rows[5]["output"]
    )
    assert done.returncode == 1 and "| 0 | passes | something | passed |" in done.stdout
    again = subprocess.run([*command, "--only", "0"], capture_output=True, cwd=ROOT, env=env, timeout=120, check=False)
    assert again.returncode == 0 and len(out.read_text().splitlines()) == len(rows) + 1


def test_the_checks_are_the_twelve_of_the_docs() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text()
    assert len(checks.CHECKS) == 12
    for number, check in enumerate(checks.CHECKS):
        assert f"| {number} | {check.name} | {check.proves} |" in text

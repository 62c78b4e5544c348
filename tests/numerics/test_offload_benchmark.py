"""The offload benchmark runs, and what does not depend on speed is as it should be. Nothing here asserts a speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_benchmark_on_a_tiny_model(tmp_path: Path) -> None:
    out = tmp_path / "offload.json"
    options = "--model tiny --rows 2 --tokens 16 --steps 1 --cycles 1 --repeats 1 --distributed --json"
    command = [sys.executable, str(ROOT / "benchmarks" / "offload.py"), *options.split(), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == result
    assert result["leaked_bytes_20_cycles"] == 0
    assert result["plan_error_pct"] == 0
    assert result["peak_ratio"] == pytest.approx(0.5, abs=0.01)  # two roles of one size but for a score head
    copied = {"copy_rate_ratio", "bare_switch_ratio", "unhidden_switch_ratio", "cycle_over_resident"}
    assert all(result[name] > 0 for name in copied)

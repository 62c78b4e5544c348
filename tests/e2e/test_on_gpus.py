"""Tests of what only GPUs can show. scripts/test.sh runs them after the suite on a machine with GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.gpu.checks_memory import launch, metrics, write_ppo

ROOT = Path(__file__).resolve().parents[2]
STEPS = 2
LAYOUTS = {
    "dp2": [],
    "tp2": [f"{role}.parallel.tensor=2" for role in ("actor", "critic", "reference", "reward_model")],
}


@pytest.mark.gpu
def test_every_gpu_check_passes(tmp_path: Path) -> None:
    out = tmp_path / "gpu_check.jsonl"
    command = [sys.executable, "-m", "tests.gpu.run_checks", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert done.returncode == 0, [(one["name"], one["output"]) for one in results if one["status"] != "passed"]
    assert [one["number"] for one in results] == list(range(12))


@pytest.mark.gpu(2)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_give_the_metrics_of_one(tmp_path: Path, layout: str) -> None:
    """Over NCCL on two GPUs, in float32: the rollouts of the one process are replayed."""
    write_ppo(tmp_path, STEPS, STEPS, "fp32")
    launch(tmp_path, f"run.dir={tmp_path / 'one'}", "train.dump_rollouts=true")
    replay = f"train.replay_rollouts={tmp_path / 'one' / 'rollouts'}"
    launch(tmp_path, f"run.dir={tmp_path / 'two'}", replay, *LAYOUTS[layout], processes=2)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    names = [name for name in one[STEPS] if name.startswith(("actor/", "critic/", "kl/"))]
    assert len(names) >= 10 and os.environ.get("RANK") is None
    for step in range(1, STEPS + 1):
        for name in names:
            assert two[step][name] == pytest.approx(one[step][name], rel=1e-3, abs=1e-5), f"step {step}: {name}"

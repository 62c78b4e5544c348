"""A PPO run with vLLM that is killed while it generates, and while its last checkpoint is being written, goes on where it was, and
ends as a run that never was killed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from tests.helpers.chain import BATCH, ROOT, Chain, launch_all, read_metrics
from tests.helpers.processes import RunningJob, running, wait_for
from tests.e2e.test_resume import assert_same_weights, results

from hetero_ppo.checkpoint.manager import checkpoint_step
from hetero_ppo.rollout.replay import read_rollouts, step_path

pytestmark = pytest.mark.slow

START_S, SOON_S = 240.0, 60.0
CHUNK = 6
#: The first checkpoint is written as ever, the second one never to its end; nothing else happens.
HELD = {"point": "call:hetero_ppo.engines.shared_device:SharedDevice.close", "logged": 2, "what": "hang", "held": True}


def banked(run_dir: Path, step: int) -> int:
    """Count the responses in the bank of a step during its generation. The first line of the file is the key."""
    path = run_dir / "bank" / f"step_{step:06d}.jsonl"
    return max(0, path.read_text().count("\n") - 1) if path.exists() else 0


def kill_in_generation(job: RunningJob, run_dir: Path) -> int:
    """Send SIGKILL to the rank when some responses of a step are complete and others are not. Return the number of finished steps."""
    while True:
        wait_for(lambda: 2 <= banked(run_dir, job.steps_done()) < BATCH, "a step half generated", START_S)
        done = job.steps_done()
        if 2 <= banked(run_dir, done) < BATCH:
            (rank,) = set(job.find("faults_worker.py")) - set(job.find("hetero_ppo.cli.launcher"))
            os.kill(rank, signal.SIGKILL)
            return done


def test_killed_in_generation(chain: Chain, tmp_path: Path) -> None:
    run_dir, straight = tmp_path / "run", tmp_path / "straight"
    same = {"data__eval": "null", "train__eval_function": "null", "checkpoint__every": 1}
    longer = {"rollout__sampling__max_tokens": 24}
    command = chain.train_command("ppo", run_dir, train__steps=400, **same, **longer)
    worker = [str(ROOT / "benchmarks" / "faults_worker.py"), json.dumps(HELD)]
    with running(1, command, run_dir, worker) as job:
        job.wait_steps(2, START_S)
        done = kill_in_generation(job, run_dir)
        assert job.wait_end(SOON_S) == 128 + signal.SIGKILL, job.text[-3000:]
        assert job.text.splitlines()[-1] == "error: rank 0 was ended by SIGKILL (signal 9)"
        job.assert_nothing_is_left()
    there = banked(run_dir, done)
    assert done == 2 and checkpoint_step(run_dir, None) == 1
    assert (run_dir / "checkpoints" / "iter_0000002.tmp").exists()
    steps = {"train__steps": done + 2}
    resumed = chain.train_command("ppo", run_dir, checkpoint__load=run_dir, **steps, **same, **longer)
    replay = {"train__replay_rollouts": run_dir / "rollouts", **same, **longer}
    launch_all(1, [resumed, chain.train_command("ppo", straight, **steps, **replay)])
    after = read_metrics(run_dir)
    assert (after[done]["rollout/banked_share"], after[done + 1]["rollout/banked_share"]) == (1.0, there / BATCH)
    assert "rollout/banked_share" not in after[done + 2]
    chunks = [record.chunk for record in read_rollouts(step_path(run_dir / "rollouts", done + 1))]
    assert [chunks.count(chunk) for chunk in range(3)] == [CHUNK, CHUNK, BATCH - 2 * CHUNK]

    expected = results(straight)
    found = {
        step: {n: v for n, v in values.items() if n in expected[step]} for step, values in results(run_dir).items()
    }
    assert found == expected
    assert_same_weights(straight / "hf", run_dir / "hf")

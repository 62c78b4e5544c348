"""A run that is asked to stop saves, ends with its own exit status, and goes on as if it had not been stopped."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from chain import Chain, launch_all, read_metrics
from e2e.processes import LOOPBACK_ADDRESSES, listening_addresses, running

from hetero_ppo.errors import EXIT_STOPPED

pytestmark = pytest.mark.slow

START_S, SOON_S = 180.0, 60.0
STEPS = 6


def test_sigterm_to_the_launcher_saves_ppo(chain: Chain, tmp_path: Path) -> None:
    """Exit status, checkpoint, rollouts of every step; nothing is left running. That it goes on to the same bits: test_killed.py.

    Launcher, ranks, server and its engine listen on loopback and on unix sockets alone.
    """
    run_dir = tmp_path / "run"
    command = [*chain.train_command("ppo", run_dir, train__steps=400, data__eval="null"), "train.eval_function=null"]
    with running(2, command, run_dir) as job:
        job.wait_steps(1, START_S)
        assert len(job.processes) >= 6 and listening_addresses(job.processes) <= LOOPBACK_ADDRESSES
        job.process.send_signal(signal.SIGTERM)
        assert job.wait_end(SOON_S) == EXIT_STOPPED, job.text[-3000:]
        assert "SIGUSR1: the run stops with a checkpoint after this step" in job.text
        done = job.steps_done()
        assert f"stopped on request after step {done}, which is saved: go on with checkpoint.load={run_dir}" in job.text
        assert "error:" not in job.text and "Traceback" not in job.text
        job.assert_nothing_is_left()
    assert (run_dir / "checkpoints" / f"iter_{done:07d}" / "COMPLETE").exists()
    assert len(list((run_dir / "rollouts").glob("step_*.jsonl"))) == done


def test_sigusr1_to_one_rank_stops_all_after_the_same_step(chain: Chain, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    constant = {"actor__optimizer__lr_schedule": "constant"}  # the runs have other last steps
    with running(2, chain.train_command("sft", run_dir, train__steps=4000, checkpoint__every=0, **constant), run_dir) as job:
        job.wait_steps(2, START_S)
        os.kill(max(set(job.find("hetero_ppo.cli.main")) - set(job.find("launcher"))), signal.SIGUSR1)
        assert job.wait_end(SOON_S) == EXIT_STOPPED, job.text[-3000:]
        assert "warning: checkpoint.every is 0 and the run has 4000 steps to go" in job.text
        done = job.steps_done()
        job.assert_nothing_is_left()
    assert (run_dir / "checkpoints" / f"iter_{done:07d}" / "COMPLETE").exists()
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    both = {"train__steps": done + STEPS, **constant}
    launch_all(
        2,
        [
            chain.train_command("sft", straight, **both),
            chain.train_command("sft", resumed, **both, checkpoint__load=run_dir),
        ],
    )
    expected, found = read_metrics(straight), read_metrics(resumed)
    assert list(found) == list(range(done + 1, done + STEPS + 1))
    assert json.dumps([found[step] for step in found]) == json.dumps([expected[step] for step in found])

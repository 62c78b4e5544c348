"""A run that is asked to stop saves, ends with its own exit status, and goes on as if it had not been stopped."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from statistics import mean

import pytest
from tests.helpers.chain import Chain, launch_all, read_metrics
from tests.helpers.ppo_runs import prepare
from tests.helpers.processes import LOOPBACK_ADDRESSES, listening_addresses, running

from hetero_ppo.errors import EXIT_STOPPED

pytestmark = pytest.mark.slow

START_S, SOON_S = 180.0, 60.0
STEPS, SOAK_STEPS = 6, 8


def test_sigterm_to_the_launcher_saves_ppo_and_engine_and_trainer_have_stayed_together(tmp_path: Path) -> None:
    """Exit status, checkpoint, rollouts of every step; nothing is left running. That it goes on to the same bits: test_killed.py.

    Launcher, ranks, server and its engine listen on loopback and on unix sockets alone. The model is a mixture of experts that are
    spread over two trainers, in fp32. With stale or misplaced experts log-probs of the engine differed by 0.7.
    """
    runs = prepare(tmp_path, head_dim=32)  # the least that vLLM has a CPU kernel for
    roles = {"actor": {"expert": 2}, "critic": {"expert": 2}}
    run_dir, command = tmp_path / "live", runs.command("live", "moe", roles, steps=400)
    rollout = {"kv_cache_mib": 32, "server_threads": 1, "max_num_seqs": 16}
    command += [
        "train.replay_rollouts=null",
        "train.dump_rollouts=true",
        "algorithm.minibatch_size=16",
        "rollout.sampling.temperature=1.0",
    ]
    command += [f"rollout.{name}={value}" for name, value in rollout.items()]
    with running(2, command, run_dir) as job:
        job.wait_steps(1, START_S)
        assert len(job.processes) >= 6 and listening_addresses(job.processes) <= LOOPBACK_ADDRESSES
        job.wait_steps(SOAK_STEPS, START_S)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait_end(SOON_S) == EXIT_STOPPED, job.text[-3000:]
        assert "SIGUSR1: the run stops with a checkpoint after this step" in job.text
        done = job.steps_done()
        assert f"stopped on request after step {done}, which is saved: go on with checkpoint.load={run_dir}" in job.text
        assert "error:" not in job.text and "Traceback" not in job.text
        job.assert_nothing_is_left()
    assert (run_dir / "checkpoints" / f"iter_{done:07d}" / "COMPLETE").exists()
    assert len(list((run_dir / "rollouts").glob("step_*.jsonl"))) == done
    steps = read_metrics(run_dir)
    assert list(steps) == list(range(1, done + 1))
    for step, values in steps.items():
        assert values["rollout/log_prob_diff_max"] < 1e-4, step
        assert values["rollout/ratio_outside_share"] == 0, step
        assert values["rollout/probe_log_prob_diff"] < 1e-4, step
        assert abs(values["actor/ppo_kl_first"]) < 1e-7, step
    differences = [values["rollout/log_prob_diff_mean"] for values in steps.values()]
    assert mean(differences[-4:]) < 1.5 * mean(differences[:4]), "the difference grows"


def test_sigusr1_to_one_rank_stops_all_after_the_same_step(chain: Chain, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    constant = {"actor__optimizer__lr_schedule": "constant"}  # the runs have other last steps
    with running(
        2, chain.train_command("sft", run_dir, train__steps=4000, checkpoint__every=0, **constant), run_dir
    ) as job:
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

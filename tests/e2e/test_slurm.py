"""A real Slurm preempts a run of two ranks and starts it again, until it is finished."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.helpers.chain import Chain, environment, read_metrics
from tests.helpers.processes import marked, wait_for
from tests.helpers.slurm_cluster import slurm_cluster, why_not

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]

STEPS = 12
#: A start on a busy machine.
START_S = 180.0


def test_a_preempted_job_is_requeued_and_finishes(chain: Chain, tmp_path: Path) -> None:
    run_dir, cluster_dir = tmp_path / "run", tmp_path / "slurm"
    cluster_dir.mkdir()
    env = environment("slurm-" + tmp_path.name) | {
        "RUN_DIR": str(run_dir),
        "CONFIG": str(chain.configs["ppo"]),
        "NPROC_PER_NODE": "2",
        "VENV": sys.prefix,
    }
    overrides = [f"train.steps={STEPS}", "rollout.engine=megatron", "data.eval=null", "train.eval_function=null"]
    log = tmp_path / "job.log"

    def steps_done() -> int:
        path = run_dir / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    with slurm_cluster(cluster_dir) as cluster:
        wait_for(lambda: "idle" in cluster.call("sinfo", "--noheader"), "the node", 30.0)
        submit = ["sbatch", "--parsable", "--partition", "low", "--exclusive", "--time", "10", f"--output={log}"]
        job = cluster.call(*submit, "scripts/slurm/ppo.sbatch", *overrides, **env).strip()
        wait_for(lambda: steps_done() >= 2, "two steps", START_S)
        urgent = [
            "sbatch",
            "--parsable",
            "--partition",
            "high",
            "--exclusive",
            "--output=/dev/null",
            "--wrap",
            "sleep 1",
        ]
        other = cluster.call(*urgent).strip()
        wait_for(lambda: cluster.job_state(other) == "COMPLETED", "the urgent job", START_S)
        saved = int((run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
        assert 2 <= saved < STEPS and cluster.job_state(job) != "COMPLETED"
        wait_for(lambda: cluster.job_state(job) == "COMPLETED", "the job", 2 * START_S)
    text = log.read_text()
    assert f"stopped on request after step {saved}, which is saved" in text
    assert f"resumed PPO from {run_dir} at step {saved}" in text and f"finished: {run_dir}" in text
    assert (run_dir / "FINISHED").exists() and list(read_metrics(run_dir)) == list(range(1, STEPS + 1))
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == STEPS  # no step was lost, none was done twice
    assert not marked("slurm-" + tmp_path.name)

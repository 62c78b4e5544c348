"""PPO of a mixture of experts with a live server: experts that are spread over two trainers reach the engine whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from chain import launch_all, read_metrics
from distributed.ppo_runs import prepare

pytestmark = pytest.mark.slow


def test_experts_reach_the_engine(tmp_path: Path) -> None:
    """The run compares log-probs after every sync, within 1e-3; with stale or misplaced experts they differed by 0.7."""
    runs = prepare(tmp_path, head_dim=32)  # the least that vLLM has a CPU kernel for
    roles = {"actor": {"expert": 2}, "critic": {"expert": 2}}
    command = runs.command("live", "moe", roles, steps=2)
    rollout = {"kv_cache_mib": 32, "server_threads": 1, "max_num_seqs": 16}
    command += ["train.replay_rollouts=null", *(f"rollout.{name}={value}" for name, value in rollout.items())]
    launch_all(2, [command])
    metrics = read_metrics(tmp_path / "live")
    for step in (1, 2):
        assert metrics[step]["rollout/golden_log_prob_diff"] < 1e-4
        assert metrics[step]["rollout/log_prob_diff_max"] < 1e-4

"""A run whose learning rates are 0: whatever moves is the fault of something else."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest
import torch
from chain import Chain, launch_all, read_metrics
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

STEPS = 20


def test_with_no_learning_rate_engine_and_trainer_stay_together(chain: Chain, tmp_path: Path) -> None:
    """Twenty steps of rollouts, switches and weight syncs with the real engine, in fp32."""
    frozen = {"actor__optimizer__lr": 0, "critic__optimizer__lr": 0, "train__steps": STEPS}
    launch_all(1, [chain.train_command("ppo", tmp_path / "soak", checkpoint__every=0, **frozen)])
    steps = read_metrics(tmp_path / "soak")
    assert list(steps) == list(range(1, STEPS + 1))
    for step, values in steps.items():
        assert values["rollout/log_prob_diff_max"] < 1e-4, step
        assert values["rollout/ratio_outside_share"] == 0, step
        assert values["rollout/golden_log_prob_diff"] < 1e-4, step
        assert abs(values["actor/ppo_kl"]) < 1e-7 and abs(values["actor/ppo_kl_first"]) < 1e-7, step
        assert abs(values["kl/reference"]) < 1e-5, step
    differences = [values["rollout/log_prob_diff_mean"] for values in steps.values()]
    assert mean(differences[-5:]) < 1.5 * mean(differences[:5]), "the difference grows"
    before, after = (load_file(folder / "model.safetensors") for folder in (chain.export("sft"), tmp_path / "soak" / "hf"))
    assert all(torch.equal(before[name], after[name]) for name in before)

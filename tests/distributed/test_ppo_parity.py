"""PPO on the same rollouts is the same PPO, on one process and on two. More layouts: test_ppo_layouts.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.chain import NUM_STEPS, Chain, read_metrics

pytestmark = pytest.mark.slow

#: fp32 sums in another order (5e-6 relative in the policy loss, a mean of terms that nearly cancel; 1e-7 in most others), which
#: Adam carries over to the weights: each of its steps divides by the gradient's own size.
TOLERANCE = {"rel": 1e-5, "abs": 2e-6}
COMPARED = (
    *("actor/pg_loss", "actor/grad_norm", "actor/entropy", "actor/ppo_kl", "actor/kl_loss", "actor/pg_clipfrac"),
    *("critic/vf_loss", "critic/grad_norm", "critic/vpred_mean", "critic/returns/mean"),
    *("kl/reference", "kl/coef", "reward/mean", "reward/std", "reward/with_kl_mean", "response_length/mean"),
)


def test_two_processes_take_the_steps_of_one(chain: Chain, two_processes: Path) -> None:
    one, two = (read_metrics(folder) for folder in (chain.run_dir("ppo"), two_processes / "dp2"))
    assert list(two) == list(range(1, NUM_STEPS + 1))
    for step in two:
        for name in COMPARED:
            assert two[step][name] == pytest.approx(one[step][name], **TOLERANCE), (step, name)
    sizes = [
        line.split()[3]
        for line in (two_processes / "log").read_text().splitlines()
        if line.startswith("actor data parallel")
    ]
    assert sizes == ["2", "2", "2"]

"""A run that goes on from a checkpoint is the run that was never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from chain import CHECKPOINT_STEP, NUM_STEPS, SFT_CHECKPOINT_STEP, SFT_STEPS, Chain, read_metrics
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


def assert_same_weights(found: Path, expected: Path) -> None:
    a, b = (load_file(folder / "model.safetensors") for folder in (found, expected))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resumed_ppo_takes_the_same_step_bit_for_bit(chain: Chain, one_process: Path) -> None:
    """Weights, both optimizers, the KL controller, the score's moments and the order of the prompts all come back.

    The third step's rollouts are replayed, so the engine's check of the sync is the one metric that is not there.
    """
    straight, resumed = (read_metrics(folder) for folder in (chain.run_dir("ppo"), one_process / "ppo_resumed"))
    assert list(resumed) == list(range(CHECKPOINT_STEP + 1, NUM_STEPS + 1))
    expected = straight[NUM_STEPS]
    del expected["rollout/golden_log_prob_diff"]
    assert resumed[NUM_STEPS] == expected
    assert_same_weights(one_process / "ppo_resumed" / "hf", chain.export("ppo"))


def test_resumed_sft_is_the_straight_run_bit_for_bit(chain: Chain, one_process: Path) -> None:
    straight, resumed = (read_metrics(folder) for folder in (chain.run_dir("sft"), one_process / "sft_resumed"))
    assert list(resumed) == list(range(SFT_CHECKPOINT_STEP + 1, SFT_STEPS + 1))
    assert all(resumed[step] == straight[step] for step in resumed)
    assert_same_weights(one_process / "sft_resumed" / "hf", chain.export("sft"))


@pytest.mark.parametrize(("stage", "steps"), [("ppo", NUM_STEPS), ("sft", SFT_STEPS)])
def test_nothing_left_to_do_is_an_error(chain: Chain, one_process: Path, stage: str, steps: int) -> None:
    text = (one_process / "log").read_text()
    message = (
        f"error: checkpoint.load={chain.run_dir(stage)}: it is at step {steps} of {steps}, zero steps are left to do"
    )
    assert text.count(message) == 1
    assert not (one_process / f"{stage}_no_steps" / "metrics.jsonl").exists()


def test_resume_on_two_ranks_from_a_checkpoint_of_one(chain: Chain, two_processes: Path) -> None:
    """The actor's sharded optimizer (ZeRO-1) is dealt out anew."""
    straight, resumed = (read_metrics(folder) for folder in (chain.run_dir("ppo"), two_processes / "resumed"))
    assert list(resumed) == list(range(CHECKPOINT_STEP + 1, NUM_STEPS + 1))
    for name in ("actor/pg_loss", "critic/vf_loss", "actor/grad_norm", "critic/grad_norm", "reward/mean"):
        assert resumed[NUM_STEPS][name] == pytest.approx(straight[NUM_STEPS][name], rel=1e-4, abs=1e-5), name
    assert resumed[NUM_STEPS]["kl/coef"] == pytest.approx(straight[NUM_STEPS]["kl/coef"], rel=1e-6)

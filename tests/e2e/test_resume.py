"""A run that goes on from a checkpoint is the run that was never stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.helpers.chain import CHECKPOINT_STEP, NUM_STEPS, SFT_CHECKPOINT_STEP, SFT_STEPS, Chain, read_metrics
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


def assert_same_weights(found: Path, expected: Path) -> None:
    a, b = (load_file(folder / "model.safetensors") for folder in (found, expected))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def results(run_dir: Path) -> dict[int, dict[str, float]]:
    """Step -> metric -> value, without what a run says of its memory, of seconds and of rates."""

    def is_result(name: str) -> bool:
        return not name.startswith(("memory/", "pipeline/")) and not name.endswith("_s")

    steps = read_metrics(run_dir)
    return {step: {n: v for n, v in found.items() if is_result(n)} for step, found in steps.items()}


def test_resumed_ppo_takes_the_same_step_bit_for_bit(chain: Chain, one_process: Path) -> None:
    """Weights, both optimizers, the KL controller, the score's moments and the order of the prompts all come back.

    The third step's rollouts are replayed, so the engine's check of the sync is not there. Its forwards ran during generation in
    the straight run, and after it in the resumed one.
    """
    straight, resumed = (results(folder) for folder in (chain.run_dir("ppo"), one_process / "ppo_resumed"))
    assert list(resumed) == list(range(CHECKPOINT_STEP + 1, NUM_STEPS + 1))
    expected = straight[NUM_STEPS]
    del expected["rollout/probe_log_prob_diff"]
    assert resumed[NUM_STEPS] == expected
    assert_same_weights(one_process / "ppo_resumed" / "hf", chain.export("ppo"))


def test_resumed_sft_is_the_straight_run_bit_for_bit(chain: Chain, one_process: Path) -> None:
    straight, resumed = (read_metrics(folder) for folder in (chain.run_dir("sft"), one_process / "sft_resumed"))
    assert list(resumed) == list(range(SFT_CHECKPOINT_STEP + 1, SFT_STEPS + 1))
    assert all(resumed[step] == straight[step] for step in resumed)
    assert_same_weights(one_process / "sft_resumed" / "hf", chain.export("sft"))


@pytest.mark.parametrize("name", ["dp2", "megatron"])
def test_the_ledger_of_a_run_is_its_plan(two_processes: Path, name: str) -> None:
    record = json.loads((two_processes / name / "memory_ledger.json").read_text())
    assert set(record["phases"]) >= {
        "rollout",
        "scores",
        "ref_log_probs",
        "old_log_probs",
        "values",
        "train_critic",
        "weight_sync",
    }
    assert record["plan_error_pct"] < 1
    assert record["device_peak_bytes"] <= record["device_limit_bytes"]
    in_use = [switch["device_bytes"] for switch in record["switches"]]
    assert max(in_use) <= record["device_limit_bytes"]


def test_a_run_that_was_stopped_in_its_export_exports(chain: Chain, one_process: Path) -> None:
    """Its last checkpoint is there, no step is left, and ``hf`` was not finished."""
    run_dir = one_process / "sft_unexported"
    assert_same_weights(run_dir / "hf", chain.export("sft"))
    assert not (run_dir / "metrics.jsonl").exists()
    assert (run_dir / "checkpoints" / "exported_iteration.txt").read_text() == str(SFT_STEPS)


def test_a_run_that_goes_back_in_its_folder_has_every_step_once(chain: Chain, one_process: Path) -> None:
    straight, run_dir = chain.run_dir("sft"), one_process / "sft_gone_back"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, SFT_STEPS + 1))
    assert results(run_dir) == results(straight)
    folders = [run_dir / "checkpoints" / f"iter_{step:07d}" for step in (SFT_CHECKPOINT_STEP, SFT_STEPS)]
    first, last = (json.loads((folder / "trainer.json").read_text()) for folder in folders)
    assert (last["run_id"], last["begun"]) == (first["run_id"], first["begun"])
    assert_same_weights(run_dir / "hf", straight / "hf")
    text = (one_process / "log").read_text()
    assert (
        "metrics.jsonl: 3 records of steps after 5, which are done again, removed, a last line that a kill had cut removed"
        in text
    )


def test_a_second_run_in_a_used_folder_is_refused(chain: Chain, one_process: Path) -> None:
    run_dir, text = chain.run_dir("sft"), (one_process / "log").read_text()
    steps = f"{SFT_CHECKPOINT_STEP}, {SFT_STEPS}"
    assert (
        f"error: run.dir is '{run_dir}', which holds results of another run: checkpoints of the steps {steps}" in text
    )
    assert set(read_metrics(run_dir)) == set(range(1, SFT_STEPS + 1)) and chain.export("sft").is_dir()


@pytest.mark.parametrize(("stage", "steps"), [("ppo", NUM_STEPS), ("sft", SFT_STEPS)])
def test_nothing_left_to_do_is_an_error(chain: Chain, one_process: Path, stage: str, steps: int) -> None:
    text = (one_process / "log").read_text()
    message = (
        f"error: checkpoint.load={chain.run_dir(stage)}: it is at step {steps} of {steps}, zero steps are left to do"
    )
    assert text.count(message) == 1
    assert not (one_process / f"{stage}_no_steps" / "metrics.jsonl").exists()


def test_resume_on_two_ranks_from_a_checkpoint_of_one(chain: Chain, two_processes: Path) -> None:
    """The actor's sharded optimizer (ZeRO-1) is dealt out again."""
    straight, resumed = (read_metrics(folder) for folder in (chain.run_dir("ppo"), two_processes / "resumed"))
    assert list(resumed) == list(range(CHECKPOINT_STEP + 1, NUM_STEPS + 1))
    for name in ("actor/pg_loss", "critic/vf_loss", "actor/grad_norm", "critic/grad_norm", "reward/mean"):
        assert resumed[NUM_STEPS][name] == pytest.approx(straight[NUM_STEPS][name], rel=1e-4, abs=1e-5), name
    assert resumed[NUM_STEPS]["kl/coef"] == pytest.approx(straight[NUM_STEPS]["kl/coef"], rel=1e-6)

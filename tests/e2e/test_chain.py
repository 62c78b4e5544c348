"""One real run of the chain leaves the right files behind: metrics, evaluations, rollouts, checkpoints, models others can load."""

from __future__ import annotations

import json
import math
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

from tests.helpers import metrics_page
import pytest
import torch
from tests.helpers.chain import (
    BATCH,
    CHECKPOINT_STEP,
    NUM_STEPS,
    SFT_STEPS,
    Chain,
    golden_lines,
    read_metrics,
    run_in_session,
)
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hetero_ppo.config.load import load_config
from hetero_ppo.reward.golden import GOLDEN_FILE
from hetero_ppo.observability.trace import COPY_IN, COPY_OUT, GENERATOR, TRAINER, newest_trace
from hetero_ppo.rollout.replay import RolloutRecord, read_rollouts, recorded_steps
from hetero_ppo.runtime.folder_lock import LOCK_FILE
from hetero_ppo.runtime.run_folder import OTHERS, RESULTS
from hetero_ppo.runtime.settle import settle
from hetero_ppo.step.phases import step_phases
from hetero_ppo.step.roles import run_roles

pytestmark = pytest.mark.slow

PPO_METRICS = {
    *("actor/pg_loss", "actor/ppo_kl", "actor/pg_clipfrac", "actor/pg_clipfrac_lower", "actor/entropy"),
    *("actor/grad_norm", "actor/lr", "actor/kl_loss"),
    *("critic/vf_loss", "critic/vf_clipfrac", "critic/vpred_mean", "critic/vf_explained_var", "critic/returns/mean"),
    *("critic/grad_norm", "critic/lr"),
    *("reward/mean", "reward/std", "reward/with_kl_mean", "kl/reference", "kl/coef"),
    *("response_length/mean", "response_length/max", "response_length/clip_ratio"),
    *("rollout/log_prob_diff_mean", "rollout/log_prob_diff_max", "rollout/probe_log_prob_diff"),
    *("rollout/sync_s", "rollout/sync_gb_s", "rollout/verify_s"),
}
PHASES = {"rollout", "experience", "train_critic", "train_actor", "weight_sync", "total"}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    return found


def records(chain: Chain, step: int) -> list[RolloutRecord]:
    return read_rollouts(chain.run_dir("ppo") / "rollouts" / f"step_{step:06d}.jsonl")


@pytest.mark.parametrize(
    ("stage", "steps", "names"),
    [
        ("sft", SFT_STEPS, {"train/loss", "train/grad_norm", "train/lr"}),
        ("rm", 4, {"train/loss", "train/grad_norm", "train/lr", "rm/accuracy"}),
        ("ppo", NUM_STEPS, PPO_METRICS),
    ],
)
def test_every_step_reports_its_metrics(chain: Chain, stage: str, steps: int, names: set[str]) -> None:
    metrics = read_metrics(chain.run_dir(stage))
    assert list(metrics) == list(range(1, steps + 1))
    for step, values in metrics.items():
        assert names <= values.keys(), step
        assert all(value is not None and math.isfinite(value) for value in values.values()), (step, values)


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_every_name_of_a_run_is_on_the_page_of_metrics(chain: Chain, stage: str) -> None:
    phases = metrics_page.phases_of_page()
    for line in (chain.run_dir(stage) / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert {name for name in record["metrics"] if not metrics_page.matches_page(name)} == set()
        assert record["seconds"].keys() <= phases


def test_training_learns(chain: Chain) -> None:
    """SFT's loss falls from that of a uniform guess; the reward model and the critic come nearer to their targets."""
    sft, rm, ppo = (read_metrics(chain.run_dir(stage)) for stage in ("sft", "rm", "ppo"))
    assert abs(sft[1]["train/loss"] - math.log(320)) < 0.7 and sft[SFT_STEPS]["train/loss"] < 0.7 * sft[1]["train/loss"]
    assert sft[SFT_STEPS]["eval/loss"] < 0.75 * sft[1]["train/loss"]
    assert 0 <= rm[4]["eval/accuracy"] <= 1
    assert ppo[NUM_STEPS]["critic/vf_loss"] < ppo[1]["critic/vf_loss"]


def test_seconds_of_all_phases(chain: Chain) -> None:
    lines = (chain.run_dir("ppo") / "metrics.jsonl").read_text().splitlines()
    for seconds in (json.loads(line)["seconds"] for line in lines):
        assert PHASES <= seconds.keys()
        assert sum(seconds[phase] for phase in PHASES - {"total"}) <= seconds["total"] * 1.01


def test_actor_begins_as_the_reference_and_the_engine_agrees(chain: Chain) -> None:
    """fp32: the engine's log-probs of what it sampled are the trainer's, at the sampling temperature of 0.8."""
    metrics = read_metrics(chain.run_dir("ppo"))
    assert abs(metrics[1]["kl/reference"]) < 1e-5 < abs(metrics[NUM_STEPS]["kl/reference"])
    for values in metrics.values():
        assert values["rollout/log_prob_diff_max"] < 1e-3
        assert values["rollout/probe_log_prob_diff"] < 1e-3
    coefs = [values["kl/coef"] for values in metrics.values()]
    assert coefs[0] == 0.05 and len(set(coefs)) == NUM_STEPS  # the adaptive controller moves it


@pytest.mark.parametrize("name", ["before", "after"])
def test_evaluations(chain: Chain, name: str) -> None:
    found = json.loads((chain.run_dir("ppo") / f"eval_{name}.json").read_text())
    assert found["num_prompts"] == 12 and len(found["samples"]) == 8
    assert 0 <= found["accuracy"] <= 1 and 0 <= found["greedy_accuracy"] <= 1
    assert (abs(found["kl"]) < 1e-4) == (name == "before")
    assert all({"prompt", "response", "label", "score"} <= sample.keys() for sample in found["samples"])


def test_rollouts_are_dumped_with_the_weights_that_made_them(chain: Chain) -> None:
    folder = chain.run_dir("ppo") / "rollouts"
    assert recorded_steps(folder) == [1, 2, 3]
    for step in range(1, NUM_STEPS + 1):
        rows = records(chain, step)
        assert len(rows) == BATCH and {row.weight_version for row in rows} == {f"step{step - 1}"}
        assert all({"score", "prompt", "response"} <= row.extra.keys() for row in rows)
        # Two samples of each prompt lie next to each other, and differ.
        assert all(a.prompt_ids == b.prompt_ids for a, b in zip(rows[::2], rows[1::2], strict=True))
        assert any(a.response_ids != b.response_ids for a, b in zip(rows[::2], rows[1::2], strict=True))
        mean = sum(row.extra["score"] for row in rows) / BATCH
        assert mean == pytest.approx(read_metrics(chain.run_dir("ppo"))[step]["reward/mean"], abs=1e-5)


def test_forwards_begin_before_generation_ends(chain: Chain) -> None:
    """Chunks of the engine's running batch of six, in the order of completion; the last one has what is left."""
    steps = read_metrics(chain.run_dir("ppo"))
    assert all(values["pipeline/num_chunks"] == 3 for values in steps.values())
    assert any(values["pipeline/chunks_during_generation"] >= 1 for values in steps.values())
    for step in steps:
        chunks = [row.chunk for row in records(chain, step)]
        assert [chunks.count(chunk) for chunk in range(4)] == [6, 6, 4, 0]


def test_layout_of_a_run_folder(chain: Chain) -> None:
    run_dir = chain.run_dir("ppo")
    known = {path.name for pattern in (*RESULTS, *OTHERS, LOCK_FILE) for path in run_dir.glob(pattern)}
    assert {path.name for path in run_dir.iterdir()} == known, "run_folder.py has to know what a run writes"
    checkpoints = run_dir / "checkpoints"
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == str(NUM_STEPS)
    for step in (CHECKPOINT_STEP, NUM_STEPS):
        folder = checkpoints / f"iter_{step:07d}"
        assert {path.name for path in folder.iterdir()} == {
            "actor",
            "critic",
            "rng",
            "config.yaml",
            "trainer.json",
            "COMPLETE",
        }
        state = json.loads((folder / "trainer.json").read_text())
        assert state["step"] == step and {"prompts", "kl_controller", "score_moments"} <= state.keys()
    assert [path.name for path in run_dir.glob("tensorboard/events.*")]
    assert (
        load_config(str(run_dir / "config.yaml"), []).config
        == settle(load_config(str(chain.configs["ppo"]), []), on_cuda=False)[0].config
    )


def test_trace_has_all_lanes(chain: Chain) -> None:
    """The first two steps are traced; every part of the trainer and the engine tells what it did."""
    folder = chain.run_dir("ppo") / "trace"
    assert [path.name for path in sorted(folder.iterdir())] == ["step_0000001.json", "step_0000002.json"]
    trace = newest_trace(chain.run_dir("ppo"))
    config = load_config(str(chain.configs["ppo"]), []).config
    assert trace is not None and trace.lanes() == [TRAINER, GENERATOR, *run_roles(config), COPY_IN, COPY_OUT]
    names = {lane: {span.name for span in trace.spans if span.lane == lane} for lane in trace.lanes()}
    for phase in step_phases(config):
        assert phase.name in names[TRAINER] and (phase.role is None or phase.name in names[phase.role]), phase.name
    assert {"generate", "weight sync"} <= names[GENERATOR]
    assert {"rollout", "experience", "scores", "train_critic", "train_actor", "weight_sync"} <= names["trainer"]
    assert names["actor"] == {"old_log_probs", "train_actor", "optimizer step", "weight_sync"}
    assert names["critic"] == {"values", "train_critic", "optimizer step"}
    assert all(0 <= span.start <= span.end <= trace.seconds + 1e-9 for span in trace.spans)


def test_the_engine_takes_its_cache_back_after_the_sync(chain: Chain) -> None:
    """Its weights are written beside the actor's parameters alone: the KV cache comes when the actor has left."""
    trace = newest_trace(chain.run_dir("ppo"))
    assert trace is not None
    synced = next(span for span in trace.spans if (span.lane, span.name) == (GENERATOR, "weight sync"))
    turn = next(span for span in trace.spans if (span.lane, span.name) == ("actor", "weight_sync"))
    woken = [span for span in trace.spans if span.lane == GENERATOR and span.name.startswith("wake")]
    assert any(
        turn.start <= span.start <= span.end <= synced.start for span in woken if span.name == "wake for weights"
    )
    assert not any(turn.start <= span.start < turn.end for span in woken if span.name == "wake")
    assert any(turn.end <= span.start for span in woken if span.name == "wake")


def test_output_is_for_people(chain: Chain) -> None:
    """Batch arithmetic with units, tensors that were initialised, one line per step, and no warnings of libraries."""
    ppo, rm = ((chain.root / f"{stage}.log").read_text() for stage in ("ppo", "rm"))
    assert "minibatches" in ppo and "PPO epoch" in ppo
    assert "score.weight was INITIALISED" in rm and "INITIALISED" not in ppo
    assert all(f"step   {step}/{NUM_STEPS} " in ppo for step in range(1, NUM_STEPS + 1))
    for text in (ppo, rm):
        assert "Warning" not in text and "Traceback" not in text


def test_golden_scores_go_with_the_reward_model(chain: Chain) -> None:
    """Into its checkpoint and its export; PPO recomputes some at the start and after every step, as golden_every says."""
    checkpoint = chain.run_dir("rm") / "checkpoints" / "iter_0000004"
    written = (chain.export("rm") / GOLDEN_FILE).read_text()
    assert (checkpoint / GOLDEN_FILE).read_text() == written
    num_pairs = len(written.splitlines()) - 1
    assert f"reward_model: checked against {num_pairs} golden pairs" in (chain.root / "ppo.log").read_text()


def test_the_reward_models_numbers_are_those_of_another_layout(chain: Chain, two_processes: Path) -> None:
    """Trained and evaluated in one process; accuracy, scores and layers by two tensor-parallel ranks."""
    text = (two_processes / "log").read_text()
    accuracy = read_metrics(chain.run_dir("rm"))[4]["eval/accuracy"]
    assert f"accuracy {accuracy:.4%} (" in text
    assert (two_processes / "pairs.html").read_text().count("<svg") == 2
    pairs = golden_lines(chain)
    assert (
        f"{2 * len(pairs)} scores of {len(pairs)} pairs have the same bits, and so have all 4 layers of 4 of them"
        in text
    )
    scores = [json.loads(line)["score_hex"] for line in (two_processes / "scores.jsonl").read_text().splitlines()]
    assert scores == [pair["chosen_score"] for pair in pairs]


def test_ppo_changed_the_actor(chain: Chain) -> None:
    before, after = tensors(chain.export("sft")), tensors(chain.export("ppo"))
    assert before.keys() == after.keys()
    assert all(before[name].shape == after[name].shape for name in before)
    assert sum(not torch.equal(before[name], after[name]) for name in before) > len(before) // 2


@pytest.mark.parametrize(("stage", "step"), [("sft", 1), ("ppo", None)])
def test_exported_actors_load_in_transformers(chain: Chain, stage: str, step: int | None) -> None:
    """transformers gives vLLM's log-probs of sampled tokens: of PPO's first rollout, made by the SFT model's export."""
    torch.set_num_threads(1)
    model, info = AutoModelForCausalLM.from_pretrained(
        chain.export(stage), dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(chain.export(stage))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Sort"}], tokenize=False, add_generation_prompt=True
    )
    assert "Sort" in text and tokenizer.eos_token_id == model.config.eos_token_id
    assert tokenizer.chat_template == chain.template.read_text(), "the template that SFT was told to use"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    if step is not None:
        assert_log_probs_are_recorded(model, records(chain, step))


def test_exported_reward_model_loads_in_transformers(chain: Chain) -> None:
    """Its scores are those that PPO recorded."""
    torch.set_num_threads(1)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        chain.export("rm"), dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for row in records(chain, 1)[:6]:
        with torch.no_grad():
            score = model(torch.tensor([row.prompt_ids + row.response_ids])).logits
        assert score.shape == (1, 1) and float(score) == pytest.approx(row.extra["score"], abs=1e-4)


@torch.no_grad()
def assert_log_probs_are_recorded(model: Callable[..., object], rows: list[RolloutRecord]) -> None:
    """Assert that the recorded log-probs are transformers' at the sampling temperature, within 1e-3."""
    for row in rows:
        start = len(row.prompt_ids)
        logits = model(torch.tensor([row.prompt_ids + row.response_ids])).logits[0, start - 1 : -1] / 0.8
        ours = logits.log_softmax(-1).gather(1, torch.tensor(row.response_ids)[:, None])[:, 0]
        assert float((ours - torch.tensor(row.rollout_log_probs)).abs().max()) < 1e-3


def test_export_of_the_checkpoint_is_the_runs_own_bit_for_bit(chain: Chain, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    command = [sys.executable, "-m", "hetero_ppo.cli.main", "export", "--run", str(chain.run_dir("ppo"))]
    done = run_in_session([*command, "--out", str(out)], uuid.uuid4().hex, 120.0)
    assert done.returncode == 0, done.stdout
    assert f"exported actor of {chain.run_dir('ppo') / 'checkpoints' / 'iter_0000003'} to {out}" in done.stdout
    expected, found = tensors(chain.export("ppo")), tensors(out)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    names = {path.name for path in chain.export("ppo").iterdir()}
    assert names == {path.name for path in out.iterdir()}
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer_config.json", "config.json"):
        assert (chain.export("ppo") / name).read_text() == (out / name).read_text()

"""The PPO-step benchmark: parsing, arithmetic, table, JSON; memory of log-probs. Nothing here asserts a speed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoTokenizer

from hetero_ppo.config.schema import SCHEMAS

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import generators
import harness
import logprob_memory
import make_experience
import ppo_step
import ppo_step_inputs as inputs_module
import ppo_step_report as report_module
import reward_workers
import rm_alignment
import torch
from peers import environment

WORK = inputs_module.Work()

#: A run's metrics.jsonl: an evaluation without phases, two steps, and the second step again after a resume.
RECORDED = """\
{"step": 0, "time": 1.0, "metrics": {"eval/reward": 0.1}, "seconds": {}}
{"step": 1, "time": 2.0, "metrics": {"reward/mean": 0.2}, "seconds": {"rollout": 0.7, "rollout/wait": 0.6, "weight_sync": 0.05, "experience/old_log_probs": 0.1, "experience/ref_log_probs": 0.11, "experience/scores": 0.12, "experience/values": 0.13, "train_actor": 0.4, "train_critic": 0.3, "experience": 0.48, "experience/advantages": 0.02, "total": 2.0}}
{"step": 2, "time": 3.0, "metrics": {}, "seconds": {"rollout": 9.0, "weight_sync": 0.0, "total": 10.0}}
{"step": 2, "time": 4.0, "metrics": {}, "seconds": {"rollout": 0.5, "weight_sync": 0.05, "experience/old_log_probs": 0.1, "experience/ref_log_probs": 0.1, "experience/scores": 0.1, "experience/values": 0.1, "train_actor": 0.3, "train_critic": 0.3, "total": 1.6}}
"""


def steps_of(*totals: float) -> list[dict[str, float]]:
    """Return our steps with these totals, half of which is rollout."""
    phases = dict.fromkeys(report_module.PHASES, 0.0)
    return [{**phases, "rollout": total / 2, "other": total / 2, "total": total} for total in totals]


def peer_steps_of(*totals: float) -> list[dict[str, float]]:
    return [{"generation": t / 4, "forwards": t / 4, "training": t / 2, "other": 0.0, "total": t} for t in totals]


def test_read_steps_maps_phases_and_takes_the_later_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(RECORDED)
    first, second = report_module.read_steps(path)
    assert first["rollout"] == 0.7  # its child is not counted again
    assert first["reference log-probs"] == 0.11
    assert first["training critic"] == 0.3
    assert first["other"] == pytest.approx(2.0 - 1.91)  # advantages and what no phase names
    assert second["total"] == 1.6
    assert sum(v for k, v in second.items() if k != "total") == pytest.approx(1.6)


@pytest.mark.parametrize("text", ["{", '{"step": 1}', "[]", '{"step": 0, "seconds": {}}', ""])
def test_read_steps_says_what_is_wrong(tmp_path: Path, text: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        report_module.read_steps(path)


def test_summary_takes_medians() -> None:
    result = report_module.summary([steps_of(1.0, 2.0, 9.0), steps_of(4.0), steps_of(8.0)], WORK)
    assert result["samples_per_s_of_rounds"] == [32.0, 16.0, 8.0]
    assert result["samples_per_s"] == 16.0
    assert result["tokens_per_s"] == 16.0 * 80
    assert result["step_s"] == 4.0
    assert result["seconds"]["rollout"] == 2.0
    assert result["fastest_step_s"] == 1.0
    assert result["num_steps"] == 5


def test_ratios_are_paired_by_round() -> None:
    # The machine is half as fast in the second round: both systems suffer, the ratio does not.
    ours = report_module.summary([steps_of(1.0), steps_of(2.0)], WORK)
    peer = {
        "fp32": report_module.summary([peer_steps_of(3.0), peer_steps_of(6.0)], WORK),
        "bf16": report_module.summary([peer_steps_of(1.5), peer_steps_of(3.0)], WORK),
    }
    assert report_module.ratios(ours, peer, "fp32") == {
        "samples_per_s_ratio": 3.0,
        "samples_per_s_ratio_vs_best": 1.5,
        "samples_per_s_ratio_fastest_steps": 3.0,
        "peer_best_dtype": "bf16",
    }
    assert report_module.ratios(ours, peer, "bf16")["samples_per_s_ratio"] == 1.5


def sample_result(name: str, peer_s: float) -> dict:
    ours = report_module.summary([steps_of(1.0)], WORK)
    peer = {dtype: report_module.summary([peer_steps_of(peer_s)], WORK) for dtype in ("bf16", "fp32")}
    return report_module.model_result(inputs_module.SHAPES[name], "bf16", ours, "trl", peer)


def test_report_keys_and_smallest_ratio() -> None:
    whole = report_module.report([sample_result("2.4m", 1.5), sample_result("30m", 2.0)], WORK, {"dtype": "bf16"})
    assert json.loads(json.dumps(whole)) == whole
    assert whole["samples_per_s_ratio"] == 1.5
    assert whole["samples_per_s_ratio_vs_best"] == 1.5
    assert whole["work"] == asdict(WORK)
    small, large = whole["results"]
    assert (small["model"], small["num_parameters"]) == ("2.4m", 2_427_136)
    assert large["samples_per_s_ratio"] == 2.0
    assert set(small["ours"]["seconds"]) == {*report_module.PHASES, "other"}
    assert set(small["peer"]) == {"name", "bf16", "fp32"}


def test_report_without_a_peer_has_no_ratio() -> None:
    ours = report_module.summary([steps_of(1.0)], WORK)
    result = report_module.model_result(inputs_module.SHAPES["2.4m"], "fp32", ours, None, {})
    assert "samples_per_s_ratio" not in report_module.report([result], WORK, {})
    assert "samples/s" in report_module.table(result)


def test_table_names_every_phase_and_lines_up() -> None:
    lines = report_module.table(sample_result("2.4m", 1.5)).splitlines()
    text = "\n".join(lines)
    for phase in (
        *report_module.PHASES,
        "other",
        "generation",
        "forwards",
        "training",
        "step",
        "samples/s",
        "tokens/s",
    ):
        assert phase in text
    rows = {first: others for first, *others in (re.split(r"\s{2,}", line.strip()) for line in lines[1:-1])}
    assert rows["seconds per PPO step"] == ["ours bf16", "trl bf16", "trl fp32"]
    assert rows["generation"] == ["0.500", "0.375", "0.375"]
    assert rows["step"] == ["1.000", "1.500", "1.500"]
    assert "samples_per_s_ratio 1.5" in lines[-1]


def test_inputs_are_the_work(tmp_path: Path) -> None:
    shape = inputs_module.ModelShape("tiny", 1, 32, 48, 2, 1, 64)
    files = inputs_module.write_inputs(shape, WORK, steps=2, folder=tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(files.models["actor"])
    prompts = [json.loads(line)["prompt"] for line in files.prompts.read_text().splitlines()]
    assert len(prompts) == 2 * WORK.prompts_per_step
    ids = tokenizer(prompts)["input_ids"]
    assert {len(row) for row in ids} == {WORK.prompt_tokens}
    assert all(0 < token < shape.vocab_size for row in ids for token in row)
    for role, path in files.models.items():
        config = AutoConfig.from_pretrained(path)
        assert (config.vocab_size, config.tie_word_embeddings) == (64, False), role
        assert (path / "model.safetensors").exists()


def test_parameter_count_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    from safetensors import safe_open

    shape = inputs_module.ModelShape("tiny", 2, 32, 48, 4, 2, 64)
    inputs_module.write_model(shape, "actor", 1, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert sum(file.get_tensor(name).numel() for name in file.keys()) == shape.num_parameters  # noqa: SIM118


def test_our_config_is_accepted_by_the_schema(tmp_path: Path) -> None:
    files = inputs_module.Inputs({role: tmp_path / role for role in inputs_module.ROLES}, tmp_path / "prompts.jsonl")
    config = inputs_module.our_config(files, WORK, "bf16", steps=3, run_dir=tmp_path / "run", micro_batch=16)
    merged = OmegaConf.merge(OmegaConf.structured(SCHEMAS["ppo"]), config)
    assert merged.rollout.sampling.max_tokens == 64
    assert merged.rollout.sampling.ignore_eos
    assert merged.algorithm.rollout_batch_size == 64
    assert merged.actor.model.dtype.value == "bf16"


def test_a_failing_run_raises_with_its_last_lines(tmp_path: Path) -> None:
    code = "import sys; print('the reason'); sys.exit(3)"
    with pytest.raises(RuntimeError, match="(?s)ended with 3.*the reason"):
        ppo_step.run_process([sys.executable, "-c", code], tmp_path / "log.txt", timeout_s=30)


def test_a_run_past_its_time_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ran past 1 s"):
        ppo_step.run_process([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log.txt", timeout_s=1)


def test_nothing_is_left_when_a_wait_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen] = []

    class Interrupted(subprocess.Popen):
        def wait(self, timeout: float | None = None) -> int:
            if not started:
                started.append(self)
                sys.exit(143)  # what the handler of SIGTERM raises
            return super().wait(timeout)

    monkeypatch.setattr(ppo_step.subprocess, "Popen", Interrupted)
    with pytest.raises(SystemExit):
        ppo_step.run_process([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log.txt", timeout_s=30)
    assert started[0].poll() is not None


def test_arguments() -> None:
    args = ppo_step.parse_arguments(["--model", "2.4m", "--peer", "trl", "actor.micro_batch_size=4", "--dtype", "fp32"])
    assert (args.rounds, args.overrides, args.dtype) == (3, ["actor.micro_batch_size=4"], "fp32")
    assert args.peer_dtypes == ["bf16", "fp32"]
    only_ours = ppo_step.parse_arguments(["--peer", "trl", "--dtype", "bf16", "--peer-dtypes", "bf16"])
    assert only_ours.peer_dtypes == ["bf16"]
    assert ppo_step.parse_arguments([]).rounds == 1


def test_peer_never_goes_into_the_running_environment(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="environment of this project"):
        environment.ensure_trl(Path(sys.prefix))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="not empty"):
        environment.ensure_trl(tmp_path)


def test_peer_has_the_torch_of_this_project() -> None:
    found = environment.installed_versions(Path(sys.executable), ["torch", "transformers", "no-such-package"])
    required = environment.trl_requirements()
    assert found == {name: required[name] for name in ("torch", "transformers")}
    assert required["trl"] == "1.12.0"


def test_peer_script_compiles() -> None:
    # It needs TRL to run; that it parses under this Python can be checked without.
    script = BENCHMARKS / "peers" / "trl_ppo.py"
    code = "import ast, sys; ast.parse(open(sys.argv[1]).read())"
    subprocess.run([sys.executable, "-c", code, str(script)], check=True)


def test_log_probs_take_less_memory_than_the_plain_way() -> None:
    """Forward: slices of 1 MiB against two float32 copies of the logits. Training: the bf16 gradient, half a float32 copy, and slices,
    against three copies of float32.
    """
    result = logprob_memory.measure(256, 32_768, "bf16", with_entropy=True)
    logits = 256 * 32_768 * 2
    assert result["logits_bytes"] == logits and result["plain_forward_bytes"] >= 2 * 2 * logits
    assert 0 < result["forward_ratio"] < 0.15
    assert logits <= result["ours_training_bytes"] < 0.35 * result["plain_training_bytes"]
    assert result["logprob_peak_ratio"] == max(result["forward_ratio"], result["training_ratio"])


def test_generators_are_compared_within_a_round() -> None:
    """The machine is half as fast in the second round: both generators suffer, the ratio does not."""
    found = generators.summary({"vllm": [1.0, 2.0, 1.5], "megatron": [2.0, 4.0, 3.0]}, num_tokens=300)
    assert found == {"vllm_tokens_s": 200.0, "megatron_tokens_s": 100.0, "megatron_over_vllm": 0.5}
    args = generators.parse_arguments(["--prompts", "8", "--dtype", "bf16"])
    assert (args.model, args.prompts, args.tokens, args.rounds, args.dtype) == ("2.4m", 8, 64, 7, "bf16")


def test_alignment_counts_scores_and_bits_of_all_layouts_and_batchings() -> None:
    """One score of six differs, in two bits of its 32; a zero's sign is a bit like any other."""
    first = torch.tensor([1.0, -0.5, 0.0])
    other = (first.view(torch.int32) ^ torch.tensor([0, 5, 0], dtype=torch.int32)).view(torch.float32)
    found = rm_alignment.compare({"TP 1": {"x": {"one row": first, "all": other}}}, "x")
    assert found == {"num_scores": 6, "mismatched_scores": 1, "mismatched_bits": 2}
    minus_zero = {"TP 1": {"x": {"one row": first}}, "TP 2": {"x": {"one row": torch.tensor([1.0, -0.5, -0.0])}}}
    assert rm_alignment.compare(minus_zero, "x")["mismatched_bits"] == 1


def test_alignment_batchings_hold_every_sequence_once() -> None:
    sequences = [[5] * length for length in (3, 9, 1, 4, 7)]
    for batching in rm_alignment.BATCHINGS:
        parts = rm_alignment.microbatches(sequences, batching, 13, 4)
        assert sorted(row for rows, _ in parts for row in rows) == list(range(5))
        for rows, part in parts:
            longest = max(len(sequences[row]) for row in rows)
            assert part.token_ids.shape[1] >= longest + 13 and part.token_ids.shape[1] % 4 == 0
            assert part.sequence_lengths.tolist() == [len(sequences[row]) for row in rows]


def test_no_sync_is_said_not_measured() -> None:
    row = dict.fromkeys(
        (
            "generate_s",
            "forwards_s",
            "serial_s",
            "pipelined_s",
            "ideal_s",
            "pipelined_over_ideal",
            "pipelined_over_serial",
            "generation_rate_ratio",
        ),
        1.0,
    ) | {"identical_to_serial": True, "num_chunks": 2, "num_waves": 1, "response_tokens": 64}
    none = {**dict.fromkeys(make_experience.SYNC_FIGURES), "sync_none": "the actor itself generates"}
    assert make_experience.table({"fixed": row}, none).endswith("weight sync: none, the actor itself generates")


def test_the_ideal_ends_with_the_forwards_of_one_whole_chunk() -> None:
    """4 chunks of 64: a quarter of the forwards after generation, however the last chunk is cut; forwards alone wait for the first chunk."""
    metrics = {"pipeline/num_chunks": 6.0, "pipeline/num_waves": 5.0}
    seconds = {
        "generate": [4.0, 1.0],
        "first": [1.0, 0.5],
        "forwards": [2.0, 2.0],
        "serial": [6.0, 3.0],
        "pipelined": [4.95, 2.75],
    }
    found = make_experience.summary(seconds, [0.9, 1.0], True, [8] * 256, 64, metrics)
    assert found["ideal_s"] == (4.5 + 2.5) / 2
    assert found["pipelined_over_ideal"] == pytest.approx((4.95 / 4.5 + 2.75 / 2.5) / 2)


def test_contenders_take_turns_in_every_round() -> None:
    order: list[tuple[str, int]] = []

    def contender(name: str) -> Callable[[int], int]:
        return lambda number: order.append((name, number)) or 10 * number

    seen: list[tuple[int, str, int]] = []
    contenders = {name: contender(name) for name in ("ours", "peer")}
    found = harness.alternate(contenders, 2, num_warm_up=1, on_result=lambda *result: seen.append(result))
    assert order == [(name, number) for number in range(3) for name in ("ours", "peer")]
    assert found == {"ours": [10, 20], "peer": [10, 20]} and seen[:2] == [(0, "ours", 0), (0, "peer", 0)]


def test_a_ratio_is_the_median_of_those_within_a_round() -> None:
    assert harness.median_ratio([1.0, 20.0, 3.0], [2.0, 10.0, 3.0]) == 1.0


def test_a_report_ends_with_one_line_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    args = harness.parser("text", rounds=3).parse_args(["--json", str(file), "--rounds", "2"])
    args.reviews = tmp_path
    figures = harness.settings(args) | {"ratio": 0.5}
    harness.report("some", figures, args.json, text="ratio  0.5", details={"rows": [1]})
    *text, line = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {"benchmark": "some", "rounds": 2, "reviews": str(tmp_path), "ratio": 0.5}
    assert text == ["", "ratio  0.5", ""]
    assert json.loads(file.read_text()) == {**json.loads(line), "rows": [1]} and list(tmp_path.iterdir()) == [file]


def test_a_world_of_one_rank_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "7")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = dict(os.environ)
    with harness.one_rank():
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")
    assert dict(os.environ) == before


def test_every_benchmark_has_the_arguments_of_the_harness() -> None:
    """Programs alone: a file that is run by another benchmark has no arguments of its own."""
    programs = [path for path in BENCHMARKS.glob("*.py") if "argparse.ArgumentParser(" in path.read_text()]
    assert [path.name for path in programs] == ["harness.py"]


def test_reward_workers_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_workers, "EMPTY_CALLS", 130)
    found = reward_workers.measure(rows=4, call_s=0.01, workers=2)
    names = {
        "waiting_s_1_workers",
        "waiting_s_2_workers",
        "waiting_s_async",
        "empty_calls_per_s_worker",
        "worker_start_s",
        "worker_rss_mib",
    }
    assert names <= set(found) and all(value > 0 for value in found.values())

"""Every family in every layout: logits as in transformers, and export(load(x)) is x bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.bridge_models import CASES, hf_model, read_tensors, same_tensors, save_case, token_ids
from tests.helpers.ranks import run_ranks

WORKER = Path(__file__).parent / "workers" / "bridge_worker.py"
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor": 2},
    "tp2sp": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "pp2vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "tp2pp2": {"tensor": 2, "pipeline": 2},
}
MOE_LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2": {"expert": 2},
    "ep4": {"expert": 4},
    "ep2pp2": {"expert": 2, "pipeline": 2},
    "tp2sp": {"tensor": 2, "sequence": True},
    "tp2sp_ep4": {"tensor": 2, "sequence": True, "expert": 4},
    "tp2sp_ep2_pp2": {"tensor": 2, "sequence": True, "expert": 2, "pipeline": 2},
}
MOE_CASES = ("qwen3_moe_untied", "qwen3_moe_tied")
#: Every family in every layout; the rope types, which no layout touches, are compared in tests/numerics.
LM_CASES = ("llama_untied", "llama_tied_llama3", "qwen2_tied", "qwen2_untied_yarn", "qwen3_tied")

LM_RUNS = [(case, layout) for case in LM_CASES for layout in LAYOUTS]
LM_RUNS += [(case, layout) for case in MOE_CASES for layout in MOE_LAYOUTS]

#: Ranks that a role has to itself, and its layout over them. Tied embeddings lie on the first and the last stage.
OWN_RANKS: dict[str, tuple[str, list[int], dict[str, Any]]] = {
    "tp2 on ranks 1 and 3": ("qwen3_tied", [1, 3], {"tensor": 2, "sequence": True}),
    "pp2 on ranks 1 and 3": ("qwen3_tied", [1, 3], {"pipeline": 2}),
    "ep2 on ranks 2 and 3": ("qwen3_moe_tied", [2, 3], {"expert": 2}),
}

pytestmark = pytest.mark.slow


def _jobs(folder: Path) -> dict[str, dict[str, Any]]:
    plan = [(case, "lm", "float32", layout) for case in LM_CASES for layout in LAYOUTS]
    plan += [("qwen3_tied", "score", "float32", layout) for layout in LAYOUTS]
    plan += [(case, "lm", "float32", layout) for case in MOE_CASES for layout in MOE_LAYOUTS]
    plan += [("llama_untied", "lm", "bfloat16", "tp2pp2")]
    return {
        f"{case}-{head}-{dtype}-{layout}": {
            "checkpoint": str(folder / f"{case}-{head}"),
            "out": str(folder / f"out-{case}-{head}-{dtype}-{layout}"),
            "head": head,
            "dtype": dtype,
            "layout": {**LAYOUTS, **MOE_LAYOUTS}[layout],
        }
        for case, head, dtype, layout in plan
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One launch of four processes does all jobs. Returns the working folder and, for each job, what each rank saw."""
    folder = tmp_path_factory.mktemp("bridge")
    for case in LM_CASES + MOE_CASES:
        save_case(case, folder / f"{case}-lm", max_shard_size="60KB")
    save_case("qwen3_tied", folder / "qwen3_tied-score", head="score")
    broken = save_case("qwen2_tied", folder / "broken-lm", max_shard_size="60KB")
    index = broken / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.3.extra.weight"] = content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    jobs = _jobs(folder)
    for name, (case, ranks, layout) in OWN_RANKS.items():
        paths = {"checkpoint": str(folder / f"{case}-lm"), "out": str(folder / f"out-{name}")}
        jobs[name] = {**paths, "head": "lm", "dtype": "float32", "layout": layout, "ranks": ranks}
    whole = next(iter(jobs.values()))
    jobs["broken"] = {**whole, "checkpoint": str(broken), "out": str(folder / "out-broken")}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run_ranks(4, [str(WORKER), str(folder / "jobs.json"), str(folder / "results.json")])
    return folder, json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize(("case", "layout"), LM_RUNS)
def test_logits_equal_transformers(run: tuple[Path, dict[str, Any]], case: str, layout: str) -> None:
    logits = torch.load(run[0] / f"out-{case}-lm-float32-{layout}.pt")
    with torch.no_grad():
        expected = hf_model(case)(token_ids()).logits
    assert expected.abs().max() > 1  # logits worth comparing
    assert (logits - expected).abs().max() <= 2e-5


@pytest.mark.parametrize(("case", "layout"), LM_RUNS)
def test_export_is_the_source(run: tuple[Path, dict[str, Any]], case: str, layout: str) -> None:
    folder, results = run
    name = f"{case}-lm-float32-{layout}"
    source, out = folder / f"{case}-lm", folder / f"out-{name}"
    assert same_tensors(read_tensors(source), read_tensors(out))
    assert ("lm_head.weight" in read_tensors(out)) == (not CASES[case][1].get("tie_word_embeddings", False))
    for file in ("config.json", "generation_config.json"):
        assert json.loads((source / file).read_text()) == json.loads((out / file).read_text())
    assert not list(folder.glob(".*"))  # nothing half-written is left
    assert all(rank["stream_equals_source"] and rank["saved_when_returned"] for rank in results[name])
    assert all(rank["initialised"] == [] for rank in results[name])


@pytest.mark.parametrize("name", OWN_RANKS)
def test_a_role_on_ranks_of_its_own(run: tuple[Path, dict[str, Any]], name: str) -> None:
    """Its ranks load, run, stream and export the model among themselves. The others have no part in it, and wait for nothing."""
    folder, results = run
    case, ranks, _ = OWN_RANKS[name]
    assert [rank for rank, seen in enumerate(results[name]) if seen] == ranks
    for rank in ranks:
        seen = results[name][rank]
        assert seen["ranks"] == ranks and seen["stream_equals_source"] and seen["saved_when_returned"]
    assert same_tensors(read_tensors(folder / f"{case}-lm"), read_tensors(folder / f"out-{name}"))
    with torch.no_grad():
        expected = hf_model(case)(token_ids()).logits
    assert (torch.load(folder / f"out-{name}.pt") - expected).abs().max() <= 2e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_score_head(run: tuple[Path, dict[str, Any]], layout: str) -> None:
    from transformers import AutoModelForSequenceClassification

    folder, results = run
    name = f"qwen3_tied-score-float32-{layout}"
    out = folder / f"out-{name}"
    assert same_tensors(read_tensors(folder / "qwen3_tied-score"), read_tensors(out))
    assert all(rank["stream_equals_source"] for rank in results[name])
    scores = torch.load(out.with_suffix(".pt"))  # [b, s, 1]
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    with torch.no_grad():
        expected = model(token_ids()).logits
    assert (scores[:, -1] - expected).abs().max() <= 2e-5


def test_bf16(run: tuple[Path, dict[str, Any]]) -> None:
    folder, results = run
    name = "llama_untied-lm-bfloat16-tp2pp2"
    expected = {key: value.bfloat16() for key, value in read_tensors(folder / "llama_untied-lm").items()}
    assert same_tensors(expected, read_tensors(folder / f"out-{name}"))
    assert json.loads((folder / f"out-{name}" / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(rank["stream_equals_source"] for rank in results[name])


def test_all_ranks_report_a_broken_checkpoint(run: tuple[Path, dict[str, Any]]) -> None:
    for rank in run[1]["broken"]:
        assert "model.safetensors.index.json" in rank["error"]
        assert "model.layers.3.extra.weight" in rank["error"]

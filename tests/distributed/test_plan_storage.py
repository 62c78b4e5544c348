"""The plan's bytes of a trained role are those that Megatron-Core really holds, rank by rank and kind by kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.bridge_models import save_case
from tests.helpers.ranks import run_ranks

WORKER = str(Path(__file__).parent / "workers" / "storage_worker.py")
#: Two processes. 131 tokens: TP 2 pads the vocabulary; sizes of 20 and 48: the distributed optimizer pads parameters.
JOBS: dict[str, dict[str, Any]] = {
    "dp2": {"case": "qwen3_tied", "dtype": "bf16", "layout": {}},
    "dp2 distributed": {"case": "qwen3_tied", "dtype": "bf16", "layout": {}, "distributed": True},
    "dp2 distributed, buckets": {
        "case": "qwen2_tied",
        "dtype": "bf16",
        "layout": {},
        "distributed": True,
        "overlap": True,
        "bucket_size": 9000,
    },
    "dp2 distributed fp32": {"case": "llama_untied", "dtype": "fp32", "layout": {}, "distributed": True},
    "dp2 aligned": {
        "case": "qwen3_tied",
        "dtype": "bf16",
        "layout": {},
        "aligned": True,
    },  # 132 tokens, as in every layout
    "tp2 value head": {"case": "qwen3_tied", "dtype": "bf16", "layout": {"tensor": 2}, "role": "critic"},
    "tp2 sequence parallel fp32": {
        "case": "llama_untied",
        "dtype": "fp32",
        "layout": {"tensor": 2, "sequence": True},
    },
    "cp2 fp32": {"case": "qwen3_tied", "dtype": "fp32", "layout": {"context": 2}},
    "pp2 tied, distributed": {"case": "qwen2_tied", "dtype": "bf16", "layout": {"pipeline": 2}, "distributed": True},
    "pp2 interleaved, untied": {
        "case": "llama_untied",
        "dtype": "bf16",
        "layout": {"pipeline": 2, "virtual_pipeline": 2},
        "distributed": True,
    },
    "ep2 distributed": {"case": "qwen3_moe_tied", "dtype": "bf16", "layout": {"expert": 2}, "distributed": True},
    "tp2 experts": {
        "case": "qwen3_moe_untied",
        "dtype": "bf16",
        "layout": {"tensor": 2, "sequence": True},
        "distributed": True,
    },
    "dp2 experts": {"case": "qwen3_moe_untied", "dtype": "bf16", "layout": {}, "distributed": True},
    "tp2 ep2 sequence parallel": {
        "case": "qwen3_moe_untied",
        "dtype": "bf16",
        "layout": {"tensor": 2, "expert": 2, "sequence": True},
        "distributed": True,
    },
    "cp2 distributed": {"case": "llama_untied", "dtype": "bf16", "layout": {"context": 2}, "distributed": True},
}


@pytest.fixture(scope="module")
def weighed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """One launch for all jobs: job -> what each rank saw."""
    folder = tmp_path_factory.mktemp("storage")
    jobs = {}
    for name, job in JOBS.items():
        role = job.get("role", "actor")
        path = folder / f"{job['case']}-{role}"
        if not path.is_dir():
            save_case(job["case"], path)
        jobs[name] = {**job, "role": role, "path": str(path)}
    out = folder / "out.json"
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run_ranks(2, [WORKER, str(folder / "jobs.json"), str(out)])
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", JOBS)
def test_parameters_are_those_of_the_built_model(weighed: dict[str, list[dict[str, Any]]], name: str) -> None:
    for rank in weighed[name]:
        assert rank["planned_parameters"] == rank["parameters"]


@pytest.mark.parametrize("name", JOBS)
def test_bytes_are_what_the_role_holds(weighed: dict[str, list[dict[str, Any]]], name: str) -> None:
    for rank in weighed[name]:
        assert rank["planned"] == {kind: size for kind, size in rank["held"].items() if size}
        assert rank["planned"] == rank["ledger"]


@pytest.mark.parametrize("name", [name for name, job in JOBS.items() if job["dtype"] == "fp32"])
def test_activations_are_what_autograd_keeps(weighed: dict[str, list[dict[str, Any]]], name: str) -> None:
    """Within 5 %: token ids and, under context parallelism, the masks of a CPU's attention are not in the formula."""
    for rank in weighed[name]:
        assert rank["activations"] == pytest.approx(rank["planned_activations"], rel=0.05)

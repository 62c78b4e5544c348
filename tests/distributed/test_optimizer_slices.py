"""Checkpoints of distributed optimizers on two ranks: nothing is gathered, any layout loads the same bits, older formats load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.bridge_models import hf_model
from tests.helpers.ranks import run_ranks

WORKER = str(Path(__file__).parent / "workers" / "slices_worker.py")
TP2 = {"tensor": 2, "sequence": True}  # 131 tokens: it pads the vocabulary
BUCKETS = {"bucket_size": 9000}
#: What is saved data-parallel on two ranks, and the loads of it.
JOBS: dict[str, dict[str, Any]] = {
    "bf16": {
        "case": "qwen2_tied",
        "dtype": "bf16",
        "written": {},
        "compared": True,
        "read": {"itself": ("slices", {}), "tp2": ("slices", TP2), "gathered, pp2": ("gathered", {"pipeline": 2})},
    },
    "fp32": {
        "case": "qwen2_tied",
        "dtype": "fp32",
        "written": {},
        "compared": False,
        "read": {"gathered, tp2": ("gathered", TP2)},
    },
    "experts, buckets": {
        "case": "qwen3_moe_untied",
        "dtype": "bf16",
        "written": BUCKETS,
        "compared": False,
        "read": {
            "itself": ("slices", BUCKETS),
            "ep2": ("slices", {"expert": 2}),
            "gathered, itself": ("gathered", BUCKETS),
        },
    },
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """One launch for all jobs: job -> what each rank saw."""
    folder = tmp_path_factory.mktemp("slices")
    for job in JOBS.values():
        if not (folder / job["case"]).is_dir():
            hf_model(job["case"], num_hidden_layers=2).save_pretrained(folder / job["case"])
    jobs = {
        name: {**job, "path": str(folder / job["case"]), "folder": str(folder / name)} for name, job in JOBS.items()
    }
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run_ranks(2, [WORKER, str(folder / "jobs.json"), str(folder / "out.json")])
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("name", JOBS)
def test_a_save_sends_no_tensor_and_copies_what_the_plan_says(
    saved: dict[str, list[dict[str, Any]]], name: str
) -> None:
    for rank in saved[name]:
        assert rank["sent"] == 0
        assert rank["copied"] == rank["planned"]


def test_global_tensors_are_those_of_megatron_core(saved: dict[str, list[dict[str, Any]]]) -> None:
    """Its fully_reshardable format, read without either's sharding: nine kinds of parameters, with three states each."""
    for rank in saved["bf16"]:
        assert rank["states"] == 27
        assert rank["beside Megatron-Core"] == []


LOADS = [
    (name, load)
    for name, job in JOBS.items()
    for load in job["read"]
    if (name, load) != ("experts, buckets", "gathered, itself")
]


@pytest.mark.parametrize(("name", "load"), LOADS)
def test_every_layout_loads_the_same_bits_in_place(
    saved: dict[str, list[dict[str, Any]]], name: str, load: str
) -> None:
    for rank in saved[name]:
        assert rank[load]["differing"] == []
        # Main parameters of fp32 roles are the parameters; those of the older format are read apart, and compared with them.
        assert rank[load]["allocated"] == (
            4 * rank[load]["parameters"] if (name, load) == ("fp32", "gathered, tp2") else 0
        )
        if load == "itself":
            again, straight = rank[load]["steps"]
            assert again == straight


def test_states_that_megatron_core_mixed_up_are_refused(saved: dict[str, list[dict[str, Any]]]) -> None:
    """With several buckets its format takes padding for elements, so parameters get the states of their neighbours."""
    for rank in saved["experts, buckets"]:
        assert "main parameters that are not those of its weights" in rank["gathered, itself"]

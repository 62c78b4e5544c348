"""The contract of aligned roles: the same bits in every layout, batching and process; and that plain roles break it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.aligned_cases import bits, results, role_config, save_models
from tests.helpers.ranks import run_ranks

from hetero_ppo.engines.model_engine import ModelEngine

WORKER = Path(__file__).parent / "workers" / "aligned_worker.py"
ROLES = [f"{role}-{dtype}" for role in ("qwen3-score", "qwen2-lm") for dtype in ("fp32", "bf16")]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aligned")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def report(models: Path) -> dict[str, Any]:
    """Return what one launch of four processes found."""
    run_ranks(4, [str(WORKER), str(models), str(models / "report.json")])
    return json.loads((models / "report.json").read_text())


@pytest.mark.parametrize("role", ROLES)
def test_aligned_bits_are_equal_everywhere(report: dict[str, Any], role: str) -> None:
    counts = report[f"{role}-aligned"]["counts"]
    assert len(counts) == (4 if "lm" in role else 7) * 5  # layouts, batchings
    assert {name: differ for name, (_, differ) in counts.items() if differ} == {}
    assert all(numbers > 0 for numbers, _ in counts.values())


@pytest.mark.parametrize("role", ROLES)
def test_plain_bits_are_not(report: dict[str, Any], role: str) -> None:
    """The comparison above can fail."""
    counts = report[f"{role}-plain"]["counts"]
    assert sum(differ for _, differ in counts.values()) > 0


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("role", ROLES)
def test_another_process_gives_the_same_bits(
    report: dict[str, Any], models: Path, world: None, role: str, threads: int
) -> None:
    model, head, dtype = role.split("-")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        config = role_config(models / f"{model}-{head}", dtype, {}, aligned=True)
        values = results(ModelEngine("reward", config, head))
    finally:
        torch.set_num_threads(before)
    assert {batching: bits(found) for batching, found in values.items()} == dict.fromkeys(
        values, report[f"{role}-aligned"]["bits"]
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_sees_the_same_scores(report: dict[str, Any], models: Path, world: None, dtype: str) -> None:
    config = role_config(models / "qwen3-score", dtype, {}, aligned=True)
    alone = results(ModelEngine("reward", config, "score"))["alone"]
    expected = sorted(float(score).hex() for score in alone)
    found = report["training"][dtype]
    assert {layout: run["scores"] for layout, run in found.items()} == dict.fromkeys(found, expected)


def test_checkpoints_are_those_of_any_role(report: dict[str, Any]) -> None:
    assert report["checkpoint"] == {"stream is the source": True, "changed": True, "loaded": True}


def test_golden_scores_and_layers_are_those_of_other_layouts(report: dict[str, Any]) -> None:
    assert report["golden"] == {"dp4": None, "tp4sp": None, "tp2pp2": None}


def test_gradients_are_those_of_the_plain_path(report: dict[str, Any]) -> None:
    """Float32 rounding apart, in every layout."""
    expected = report["plain grad_norm"]
    norms = {layout: run["grad_norm"] for layout, run in report["training"]["fp32"].items()}
    assert norms == pytest.approx(dict.fromkeys(norms, expected), rel=1e-5)

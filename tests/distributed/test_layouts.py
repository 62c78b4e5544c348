"""Losses, gradient norms, log-probs, values and scores are those of one process in every parallel layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distributed.torchrun import run_torchrun
from transformers import Qwen3Config, Qwen3ForCausalLM

WORKER = str(Path(__file__).parent / "workers" / "layout_worker.py")
LAYOUTS: dict[str, dict[str, object]] = {
    "dp2": {},
    "dp2 distributed optimizer, overlapped": {"distributed": True, "overlap": True},
    "dp2 distributed optimizer, parameter gather overlapped": {
        "distributed": True,
        "overlap": True,
        "overlap_gather": True,
    },
    "tp2": {"tensor": 2},
    "tp2 sequence parallel": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "pp2 interleaved": {"pipeline": 2, "virtual_pipeline": 2},
    "cp2": {"context": 2},
    "cp2 distributed optimizer, overlapped": {"context": 2, "distributed": True, "overlap": True},
    "tp2 full recompute": {"tensor": 2, "recompute": "full"},
    "tp2 sequence parallel, selective recompute": {"tensor": 2, "sequence": True, "recompute": "selective"},
    "cp2 full recompute": {"context": 2, "recompute": "full"},
    "pp2 selective recompute": {"pipeline": 2, "recompute": "selective"},
    "tied embeddings, pp2": {"tied": True, "pipeline": 2},
}
#: fp32 sums in another order; gradients pass through four layers of them.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}

Measured = dict[str, list[float]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Tied and untied random models; 121 tokens, so that TP 2 pads the vocabulary."""
    folders = {}
    for tied in (False, True):
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=121,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            tie_word_embeddings=tied,
        )
        folders[tied] = tmp_path_factory.mktemp("model") / str(tied)
        Qwen3ForCausalLM(config).save_pretrained(folders[tied])
    return folders


@pytest.fixture(scope="module")
def one_process(models: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    layouts = {"fp32": {}, "bf16": {"dtype": "bf16"}, "tied": {"tied": True}}
    return measure(models, layouts, 1, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two_processes(models: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    return measure(models, LAYOUTS, 2, tmp_path_factory.mktemp("two"))


def measure(
    models: dict[bool, Path], layouts: dict[str, dict[str, object]], processes: int, folder: Path
) -> dict[str, Measured]:
    """One launch for all layouts; "tied" picks the model, the other fields are the worker's."""
    jobs = {
        name: {"model": str(models[bool(layout.get("tied"))])} | {k: v for k, v in layout.items() if k != "tied"}
        for name, layout in layouts.items()
    }
    run_torchrun(processes, [WORKER, json.dumps(jobs), str(folder / "out.json")])
    return json.loads((folder / "out.json").read_text())


def assert_same(found: Measured, expected: Measured) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(values), **TOLERANCE, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_two_processes_equal_one(
    name: str, one_process: dict[str, Measured], two_processes: dict[str, Measured]
) -> None:
    """Tied embeddings over two stages: the first and last hold a copy each, and their gradients are summed."""
    assert_same(two_processes[name], one_process["tied" if LAYOUTS[name].get("tied") else "fp32"])


@pytest.mark.slow
def test_bf16_is_near_fp32_and_not_equal(one_process: dict[str, Measured]) -> None:
    """bf16 rounds: the same run differs, by little. Also shows that the comparison above can fail."""
    losses = [torch.tensor(one_process[dtype]["lm_loss"]) for dtype in ("bf16", "fp32")]
    difference = float((losses[0] - losses[1]).abs().max())
    assert 0 < difference < 0.05

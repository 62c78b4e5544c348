"""Losses, gradient norms, log-probs, values and scores are those of one process in every parallel layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.helpers.ranks import run_ranks
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

WORKER = str(Path(__file__).parent / "workers" / "layout_worker.py")
LAYOUTS: dict[str, dict[str, object]] = {
    "dp2": {},
    "dp2 distributed optimizer, parameter gather overlapped": {
        "distributed": True,
        "overlap": True,
        "overlap_gather": True,
    },
    "tp2 sequence parallel": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "pp2 interleaved": {"pipeline": 2, "virtual_pipeline": 2},
    "cp2": {"context": 2},
    "tp2 sequence parallel, selective recompute": {"tensor": 2, "sequence": True, "recompute": "selective"},
    "tied embeddings, pp2": {"model": "tied", "pipeline": 2},
    "experts, ep2": {"model": "moe", "expert": 2},
    "experts, tp2 sequence parallel": {"model": "moe", "tensor": 2, "sequence": True},
    "experts, pp2 interleaved": {"model": "moe", "pipeline": 2, "virtual_pipeline": 2},
    # Lengths of 6 to 14 tokens: budgets that leave ranks with micro-batches of other sizes, and of other numbers.
    "dp2, budget of tokens": {"tokens": 32},
    "cp2, budget of tokens": {"context": 2, "tokens": 40},
    "packed, dp2, budget of tokens": {"packing": True, "tokens": 30},
    "packed, tp2": {"packing": True, "tensor": 2, "tokens": 64},
    "packed, tp2 sequence parallel, full recompute": {
        "packing": True,
        "tensor": 2,
        "sequence": True,
        "recompute": "full",
    },
    "packed, pp2, budget of tokens": {"packing": True, "pipeline": 2, "tokens": 30},
    "packed, pp2 interleaved": {"packing": True, "pipeline": 2, "virtual_pipeline": 2},
    "packed, tied embeddings, pp2": {"packing": True, "model": "tied", "pipeline": 2},
    "packed, experts, ep2": {"packing": True, "model": "moe", "expert": 2},
}
#: fp32 main parameters beside bf16 ones.
BF16_LAYOUTS: dict[str, dict[str, object]] = {
    "bf16, tp2 sequence parallel, distributed optimizer": {"tensor": 2, "sequence": True, "distributed": True},
    "bf16, cp2, distributed optimizer": {"context": 2, "distributed": True},
    "bf16, experts, ep2": {"model": "moe", "expert": 2},
}
#: fp32 sums in another order; gradients pass through four layers of them.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}

Measured = dict[str, list[float]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models; 121 tokens, so that TP 2 pads the vocabulary."""
    sizes = {
        "vocab_size": 121,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "initializer_range": 0.1}
    configs = {
        "untied": Qwen3Config(**sizes, tie_word_embeddings=False),
        "tied": Qwen3Config(**sizes, tie_word_embeddings=True),
        "moe": Qwen3MoeConfig(**sizes, **experts),
    }
    folders = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp("model") / name
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def one_process(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    layouts = {"untied": {}, "bf16": {"dtype": "bf16"}, "tied": {"model": "tied"}, "moe": {"model": "moe"}}
    return measure(models, layouts, 1, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two_processes(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    bf16 = {name: {**layout, "dtype": "bf16"} for name, layout in BF16_LAYOUTS.items()}
    return measure(models, {**LAYOUTS, **bf16}, 2, tmp_path_factory.mktemp("two"))


def measure(
    models: dict[str, Path], layouts: dict[str, dict[str, object]], processes: int, folder: Path
) -> dict[str, Measured]:
    """Measure all layouts in one launch."""
    jobs = {name: {**layout, "model": str(models[layout.get("model", "untied")])} for name, layout in layouts.items()}
    run_ranks(processes, [WORKER, json.dumps(jobs), str(folder / "out.json")])
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
    assert_same(two_processes[name], one_process[str(LAYOUTS[name].get("model", "untied"))])


@pytest.mark.slow
def test_bf16_is_near_fp32_and_not_equal(one_process: dict[str, Measured]) -> None:
    """bf16 rounds: the same run differs, by little. Also shows that the comparison above can fail."""
    losses = [torch.tensor(one_process[dtype]["lm_loss"]) for dtype in ("bf16", "untied")]
    difference = float((losses[0] - losses[1]).abs().max())
    assert 0 < difference < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", BF16_LAYOUTS)
def test_bf16_layouts_are_near_fp32(
    name: str, one_process: dict[str, Measured], two_processes: dict[str, Measured]
) -> None:
    """Three steps from the same weights; bf16 rounds to 1 in 256, sums of many such roundings to less."""
    fp32 = one_process[str(BF16_LAYOUTS[name].get("model", "untied"))]
    for metric, tolerance in (("lm_loss", 0.01), ("lm_grad_norm", 0.02), ("rm_loss", 0.05)):
        assert two_processes[name][metric] == pytest.approx(fp32[metric], rel=tolerance), metric

"""Compares forwards of aligned and plain roles over layouts and batchings in bits, on every rank.

usage: aligned_worker.py MODELS_FOLDER OUT_JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers.bridge_models import read_tensors, same_tensors
from tests.helpers.aligned_cases import bits, results, role_config, sequences, training_scores

from hetero_ppo.data.preference import PreferenceExample
from hetero_ppo.distributed.groups import finish, initialise
from hetero_ppo.engines.model_engine import ModelEngine
from hetero_ppo.engines.train_engine import TrainEngine
from hetero_ppo.reward.golden import GOLDEN_FILE, Golden, check_golden, first_difference, make_golden

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp4": {},
    "tp2": {"tensor": 2},
    "tp2sp": {"tensor": 2, "sequence": True},
    "tp4sp": {"tensor": 4, "sequence": True},
    "tp2pp2": {"tensor": 2, "pipeline": 2},
    "packed": {"packing": True},
    "packed tp2sp": {"tensor": 2, "sequence": True, "packing": True},
}
ROLES = (("qwen3", "score"), ("qwen2", "lm"))
#: Layouts of the language model, whose head is the one part that the scores of all layouts do not show.
LM_LAYOUTS = ("dp4", "tp2sp", "tp4sp", "packed tp2sp")
PLAIN_LAYOUTS = ("dp4", "tp2")
TRAINED_LAYOUTS = ("dp4", "tp2", "tp4sp", "tp2pp2")


def main(models: str, out: str) -> None:
    torch.set_num_threads(1)
    initialise(2.0)
    report: dict[str, Any] = {}
    for model, head in ROLES:
        for dtype in ("fp32", "bf16"):
            for aligned in (True, False):
                name = f"{model}-{head}-{dtype}-{'aligned' if aligned else 'plain'}"
                report[name] = compare(Path(models) / f"{model}-{head}", head, dtype, aligned)
    report["training"] = {
        dtype: {layout: train(Path(models) / "qwen3-score", dtype, layout) for layout in TRAINED_LAYOUTS}
        for dtype in ("fp32", "bf16")
    }
    report["plain grad_norm"] = train(Path(models) / "qwen3-score", "fp32", "dp4", aligned=False)["grad_norm"]
    report["checkpoint"] = checkpoint(Path(models) / "qwen3-score", Path(out).with_suffix(".checkpoint"))
    report["golden"] = golden(Path(models) / "qwen3-score")
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(report))
    finish()


def compare(model: Path, head: Any, dtype: str, aligned: bool) -> dict[str, Any]:
    """Compare the values of every layout and batching with those of one process and single rows, on all ranks."""
    reference: list[Tensor] = []
    found: dict[str, Any] = {}
    aligned_layouts = LM_LAYOUTS if head == "lm" else tuple(LAYOUTS)
    for layout in aligned_layouts if aligned else PLAIN_LAYOUTS:
        engine = ModelEngine("reward", role_config(model, dtype, LAYOUTS[layout], aligned), head)
        by_batching = results(engine)
        reference = reference or by_batching["alone"]
        for batching, values in by_batching.items():
            differ = [int((a != b).sum()) for a, b in zip(values, reference, strict=True)]
            found[f"{layout}, {batching}"] = [sum(a.numel() for a in values), sum(differ)]
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, found)
    counts: dict[str, list[int]] = {}
    for of_rank in seen:
        for name, (numbers, differ) in of_rank.items():
            total = counts.setdefault(name, [0, 0])
            total[0] += numbers
            total[1] += differ
    return {"bits": bits(reference), "counts": counts}


def train(model: Path, dtype: str, layout: str, aligned: bool = True) -> dict[str, Any]:
    """Train one step. Return the scores of all rows that the loss saw, as sorted hex floats."""
    engine = TrainEngine("reward", role_config(model, dtype, LAYOUTS[layout], aligned), "score", 1)
    scores, grad_norm = training_scores(engine)
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, [float(score).hex() for score in scores])
    return {"scores": sorted({score for of_rank in seen for score in of_rank}), "grad_norm": grad_norm}


def checkpoint(model: Path, folder: Path) -> dict[str, bool]:
    """Save the weights of a trained aligned role in shards, load them in another layout, and compare."""
    trained = TrainEngine("reward", role_config(model, "fp32", LAYOUTS["tp2sp"], aligned=True), "score", 1)
    before = {name: tensor.clone() for name, tensor in trained.model.stream_weights()}
    training_scores(trained)
    expected = {name: tensor.clone() for name, tensor in trained.model.stream_weights()}
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    snapshot = trained.save(folder)
    assert snapshot.write()
    snapshot.finish()
    loaded = ModelEngine("reward", role_config(model, "fp32", {"tensor": 4}, aligned=False), "score")
    loaded.load_weights(folder)
    found = {name: tensor.clone() for name, tensor in loaded.stream_weights()}
    source = read_tensors(model)
    return {
        "stream is the source": same_tensors(before, source),
        "changed": not any(torch.equal(expected[name], source[name]) for name in source if "proj" in name),
        "loaded": same_tensors(found, expected),
    }


def golden(model: Path) -> dict[str, str | None]:
    """Recompute golden scores and layers of data-parallel ranks in other layouts. Return the first layer that differs, by layout."""
    rows = [tokens.tolist() for tokens in sequences()]
    examples = [PreferenceExample(chosen, rejected, 0) for chosen, rejected in zip(rows, reversed(rows))]
    found: dict[str, str | None] = {}
    reference: Golden | None = None
    for layout in ("dp4", "tp4sp", "tp2pp2"):
        engine = ModelEngine("reward", role_config(model, "bf16", LAYOUTS[layout], aligned=True), "score")
        reference = reference or make_golden(engine, examples)
        check_golden(engine, reference, model / GOLDEN_FILE, range(len(examples)))
        found[layout] = first_difference(engine, reference.pairs[2])
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])

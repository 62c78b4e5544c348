"""The first steps of PPO give the numbers of one process in every layout, with a layout of its own for each role, and when the
last of them is done in another layout than the first.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import pytest
from tests.helpers.ppo_runs import NUM_STEPS, PpoRuns, prepare, prepare_scorer

from hetero_ppo.cli.main import main
from hetero_ppo.rollout.replay import RolloutRecord, read_rollouts

pytestmark = pytest.mark.slow

DISTRIBUTED = {"optimizer.distributed": True, "ddp.overlap_grad_reduce": True}
GATHERED = {**DISTRIBUTED, "ddp.overlap_param_gather": True}
TP2SP = {"tensor": 2, "sequence": True}
TP2PP2 = {"tensor": 2, "pipeline": 2}
PP2VPP2 = {"pipeline": 2, "virtual_pipeline": 2}


@dataclass(frozen=True)
class Run:
    """One PPO run. A role without a layout is data-parallel alone."""

    processes: int
    model: str
    roles: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: int = 2  # done in the end: the second one's forwards are of weights that the first one has changed
    load: str | None = None  # the run whose last checkpoint this one goes on from, in another layout


RUNS: dict[str, Run] = {
    "dense on one process": Run(1, "dense", steps=NUM_STEPS),
    "moe on one process": Run(1, "moe", steps=NUM_STEPS),
    # --- two processes ---
    "tp2 pp2 dp2 tp2sp": Run(2, "dense", {"actor": {"tensor": 2}, "critic": {"pipeline": 2}, "reward_model": TP2SP}),
    "pp2 tp2sp interleaved cp2": Run(
        2,
        "dense",
        {"actor": {"pipeline": 2}, "critic": TP2SP, "reference": PP2VPP2, "reward_model": {"context": 2}},
    ),
    "cp2 recomputed, interleaved recomputed": Run(
        2,
        "dense",
        {
            "actor": {"context": 2, "recompute": "full"},
            "critic": {**PP2VPP2, "recompute": "selective"},
            "reference": {"context": 2},
        },
    ),
    "dp2 distributed optimizers": Run(2, "dense", {"actor": GATHERED, "critic": DISTRIBUTED}),
    "moe ep2, tp2sp, pp2": Run(2, "moe", {"actor": {"expert": 2}, "critic": TP2SP, "reference": {"pipeline": 2}}),
    "moe tp2sp-ep2, ep2 distributed optimizer recomputed": Run(
        2,
        "moe",
        {
            "actor": {**TP2SP, "expert": 2},
            "critic": {"expert": 2, "recompute": "selective", **DISTRIBUTED},
            "reward_model": {"expert": 2, "context": 2},
        },
    ),
    "moe ep2, tp2sp, pp2, all resident": Run(
        2,
        "moe",
        {"actor": {"expert": 2}, "critic": TP2SP, "reference": {"pipeline": 2}, "residency": {"offload": False}},
    ),
    # --- four processes ---
    "tp2-pp2, tp2-dp2, pp2-dp2, dp4": Run(
        4, "dense", {"actor": TP2PP2, "critic": {"tensor": 2}, "reference": {"pipeline": 2}}
    ),
    "dp4 distributed optimizer, tp2-pp2": Run(
        4, "dense", {"actor": GATHERED, "critic": TP2PP2, "reward_model": TP2PP2}
    ),
    "cp2-tp2sp, cp2-pp2, cp4, tp2sp-interleaved": Run(
        4,
        "dense",
        {
            "actor": {**TP2SP, "context": 2},
            "critic": {"context": 2, "pipeline": 2},
            "reference": {"context": 4},
            "reward_model": {**TP2SP, **PP2VPP2},
        },
    ),
    "interleaved-dp2, tp2sp-dp2, distributed optimizers": Run(
        4,
        "dense",
        {"actor": {**PP2VPP2, **GATHERED}, "critic": {**TP2SP, **DISTRIBUTED, "recompute": "full"}},
    ),
    "moe ep2-pp2, ep2-dp4, tp2sp-ep4, ep4": Run(
        4,
        "moe",
        {
            "actor": {"expert": 2, "pipeline": 2},
            "critic": {"expert": 2, **GATHERED},
            "reference": {**TP2SP, "expert": 4},
            "reward_model": {"expert": 4},
        },
    ),
    "moe tp2sp-ep2-pp2, cp2-ep4": Run(
        4,
        "moe",
        {
            "actor": {**TP2SP, "expert": 2, "pipeline": 2, **DISTRIBUTED},
            "critic": {"context": 2, "expert": 4, "recompute": "full"},
        },
    ),
    # --- the last step in another layout than the first two ---
    "dp2 to tp2-pp2, dp2 to dp4": Run(
        4,
        "dense",
        {"actor": {**TP2PP2, **DISTRIBUTED}, "critic": DISTRIBUTED},
        steps=NUM_STEPS,
        load="dp2 distributed optimizers",
    ),
    "dp4 to one process, tp2-pp2 to one process": Run(
        1, "dense", {"actor": DISTRIBUTED}, steps=NUM_STEPS, load="dp4 distributed optimizer, tp2-pp2"
    ),
    "moe ep2-pp2 to one process, ep2-dp4 to one process": Run(
        1, "moe", {"critic": DISTRIBUTED}, steps=NUM_STEPS, load="moe ep2-pp2, ep2-dp4, tp2sp-ep4, ep4"
    ),
}

#: fp32 sums in another order: 1e-7 in most metrics of the first step, and what Adam makes of it in the weights of the later ones,
#: since each of its steps divides by the gradient's own size. Metrics near 0 are means of terms that nearly cancel.
TOLERANCE = {"rel": 1e-5, "abs": 2e-6}
#: Losses and gradient norms that do not: relative alone.
RELATIVE = {"rel": 1e-5, "abs": 0.0}
OF_ONE_SIGN = ("actor/grad_norm", "actor/entropy", "critic/vf_loss", "critic/grad_norm")
#: exp(d) - 1 - d of log-prob differences d that are near 0: what is left when its terms have nearly cancelled.
KL_LOSS_TOLERANCE = {"rel": 1e-5, "abs": 1e-7}
#: A difference of two sums of log-probs, each of about 40 nats a response: a millionth of one of them.
KL_TOLERANCE = {"rel": 1e-5, "abs": 4e-5}
OF_DIFFERENCES = {"kl/reference": KL_TOLERANCE, "actor/kl_loss": KL_LOSS_TOLERANCE}
COMPARED = (
    *("actor/pg_loss", "actor/grad_norm", "actor/entropy", "actor/ppo_kl", "actor/kl_loss", "actor/pg_clipfrac"),
    *("critic/vf_loss", "critic/grad_norm", "critic/vpred_mean", "critic/returns/mean"),
    *("kl/reference", "reward/mean", "reward/std", "reward/with_kl_mean", "response_length/mean"),
)

Metrics = dict[str, dict[int, dict[str, float]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> PpoRuns:
    return prepare(tmp_path_factory.mktemp("ppo_layouts"))


@pytest.fixture(scope="module")
def metrics(runs: PpoRuns) -> Metrics:
    """One launch for each number of processes does all runs."""
    found: Metrics = {}
    for processes in (2, 4, 1):  # those that are loaded come before those that load them
        chosen = {name: run for name, run in RUNS.items() if run.processes == processes}
        commands = {
            name: runs.command(folder_name(name), run.model, run.roles, run.steps, run.load and folder_name(run.load))
            for name, run in chosen.items()
        }
        if processes == 2:
            commands[SCORERS] = scorers_command(runs)
        found |= runs.launch(processes, commands)
    return found


def folder_name(name: str) -> str:
    """Return a folder's name without commas and spaces, which have a meaning in overrides."""
    return name.replace(",", "").replace(" ", "_")


@pytest.mark.parametrize("name", RUNS)
def test_every_layout_takes_the_steps_of_one_process(metrics: Metrics, name: str) -> None:
    run = RUNS[name]
    one = metrics[f"{run.model} on one process"]
    first = RUNS[run.load].steps if run.load else 0
    assert list(metrics[name]) == list(range(first + 1, run.steps + 1))
    for step, values in metrics[name].items():
        for metric in COMPARED:
            tolerance = RELATIVE if metric in OF_ONE_SIGN else TOLERANCE
            tolerance = OF_DIFFERENCES.get(metric, tolerance)
            assert values[metric] == pytest.approx(one[step][metric], **tolerance), (step, metric)


def test_turns_change_no_bit(metrics: Metrics) -> None:
    name = "moe ep2, tp2sp, pp2"
    turns, resident = metrics[name], metrics[f"{name}, all resident"]
    for step, values in resident.items():
        for metric in COMPARED:
            assert values[metric] == turns[step][metric], (step, metric)
        assert values["memory/to_device_gib"] == 0 < turns[step]["memory/to_device_gib"]


def test_the_runs_differ_from_step_to_step(metrics: Metrics) -> None:
    """The comparison above would notice a layout that does not train."""
    for model in ("dense", "moe"):
        values = [values["critic/vf_loss"] for values in metrics[f"{model} on one process"].values()]
        assert len({round(value, 4) for value in values}) == NUM_STEPS


SCORERS = "scorers"  # two reward models in layouts of their own, the second with a tokenizer of its own, and a function


def scorers_command(runs: PpoRuns) -> list[str]:
    dense = {"model": {"path": str(runs.root / "dense" / "scorer"), "tokenizer": str(runs.root / "tokenizer")}}
    other = {"model": {"path": str(prepare_scorer(runs.root)), "dtype": "bf16"}, "re_encode": {"max_tokens": 160}}
    fields: dict[str, object] = {
        "reward_model": "null",
        "reward_models": json.dumps([{**dense, "aligned": True, "parallel": TP2SP}, {**other, "aligned": True}]),
        "reward.source": "mix",
        "reward.function": f"{runs.root / 'brevity.py'}:score",
        "reward.function_weight": 0.25,
        "reward.ensemble": "mean_minus_std",
        "reward.ensemble_k": 0.5,
        "train.dump_rollouts": True,
    }
    return runs.command(SCORERS, "dense", {}, 1, fields=fields)


def test_an_ensemble_and_a_function_mix(metrics: Metrics, runs: PpoRuns) -> None:
    rows = read_rollouts(runs.root / SCORERS / "rollouts" / "step_000001.jsonl")
    parts = {name: np.array([row.extra[name] for row in rows]) for name in rows[0].extra if name.startswith("score_")}
    assert list(parts) == ["score_model", "score_function", "score_model_0", "score_model_1", "score_ensemble_std"]
    members = np.stack([parts["score_model_0"], parts["score_model_1"]])
    assert (parts["score_model"] == np.float32(members.mean(axis=0) - 0.5 * members.std(axis=0))).all()
    assert parts["score_function"].tolist() == [np.float32(-len(row.extra["response"]) / 8) for row in rows]
    mixed = np.float32(parts["score_model"] + 0.25 * parts["score_function"])
    assert [row.extra["score"] for row in rows] == mixed.tolist()
    logged = metrics[SCORERS][1]
    for name in ("model", "function", "model_0", "model_1", "ensemble_std"):
        assert logged[f"reward/{name}/mean"] == pytest.approx(parts[f"score_{name}"].mean(), rel=1e-5)
    assert logged["reward/re_encoded/model_1/num_cut"] == 0 < logged["reward/re_encoded/model_1/length/mean"]
    ledger = json.loads((runs.root / SCORERS / "memory_ledger.json").read_text())
    assert {"reward_models.0"} == set(ledger["phases"]["scores_0"]) and {"reward_models.1"} == set(
        ledger["phases"]["scores_1"]
    )
    assert ledger["plan_error_pct"] == 0


def test_scores_of_ppo_are_those_of_the_command_bit_for_bit(metrics: Metrics, runs: PpoRuns, tmp_path: Path) -> None:
    """Ids of two tensor-parallel ranks, and texts that were encoded again, by one process."""
    rows = read_rollouts(runs.root / SCORERS / "rollouts" / "step_000001.jsonl")
    ids = [{"token_ids": row.prompt_ids + row.response_ids} for row in rows]
    assert scored(runs.root / "dense" / "scorer", ids, tmp_path, "fp32") == [
        row.extra["score_model_0"].hex() for row in rows
    ]
    ended = [row for row in rows if row.finish_reason == "stop" and row.extra["response"].strip()]
    texts = [{"messages": conversation(row)} for row in ended]
    assert len(ended) > 3
    assert scored(runs.root / "scorer", texts, tmp_path, "bf16") == [row.extra["score_model_1"].hex() for row in ended]


def conversation(row: RolloutRecord) -> list[dict[str, str]]:
    return [{"role": "user", "content": row.extra["prompt"]}, {"role": "assistant", "content": row.extra["response"]}]


def scored(checkpoint: Path, rows: list[dict[str, Any]], folder: Path, dtype: str) -> list[str]:
    data, out = folder / "rows.jsonl", folder / "scores.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["score", "--checkpoint", str(checkpoint), "--data", str(data), "--out", str(out), "--dtype", dtype]
    assert main([*command, "--micro-batch-size", "3"]) == 0
    return [json.loads(line)["score_hex"] for line in out.read_text().splitlines()]

"""The first steps of PPO give the numbers of one process in every layout, with a layout of its own for each role, and when the
last of them is done in another layout than the first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from distributed.ppo_runs import NUM_STEPS, prepare

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
    steps: int = NUM_STEPS  # done in the end
    load: str | None = None  # the run whose last checkpoint this one goes on from, in another layout


RUNS: dict[str, Run] = {
    "dense on one process": Run(1, "dense"),
    "moe on one process": Run(1, "moe"),
    # --- two processes ---
    "tp2 pp2 dp2 tp2sp": Run(2, "dense", {"actor": {"tensor": 2}, "critic": {"pipeline": 2}, "reward_model": TP2SP}),
    "pp2 tp2sp interleaved cp2": Run(
        2,
        "dense",
        {"actor": {"pipeline": 2}, "critic": TP2SP, "reference": PP2VPP2, "reward_model": {"context": 2}},
    ),
    "interleaved cp2 tp2 dp2": Run(
        2, "dense", {"actor": PP2VPP2, "critic": {"context": 2}, "reference": {"tensor": 2}}
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
    "dp2 distributed optimizers": Run(2, "dense", {"actor": GATHERED, "critic": DISTRIBUTED}, steps=2),
    "tp2sp recomputed, dp2": Run(
        2, "dense", {"actor": {**TP2SP, "recompute": "full"}, "reward_model": {"pipeline": 2}}
    ),
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
    "moe interleaved, interleaved recomputed": Run(
        2,
        "moe",
        {"actor": PP2VPP2, "critic": {**PP2VPP2, "recompute": "full"}, "reference": {**PP2VPP2}},
    ),
    # --- four processes ---
    "tp2-pp2, tp2-dp2, pp2-dp2, dp4": Run(
        4, "dense", {"actor": TP2PP2, "critic": {"tensor": 2}, "reference": {"pipeline": 2}}
    ),
    "dp4 distributed optimizer, tp2-pp2": Run(
        4, "dense", {"actor": GATHERED, "critic": TP2PP2, "reward_model": TP2PP2}, steps=2
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
        steps=2,
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
        4, "dense", {"actor": {**TP2PP2, **DISTRIBUTED}, "critic": DISTRIBUTED}, load="dp2 distributed optimizers"
    ),
    "dp4 to one process, tp2-pp2 to one process": Run(
        1, "dense", {"actor": DISTRIBUTED}, load="dp4 distributed optimizer, tp2-pp2"
    ),
    "moe ep2-pp2 to one process, ep2-dp4 to one process": Run(
        1, "moe", {"critic": DISTRIBUTED}, load="moe ep2-pp2, ep2-dp4, tp2sp-ep4, ep4"
    ),
}

#: fp32 sums in another order: 1e-7 in most metrics of the first step, and what Adam makes of it in the weights of the later ones,
#: since each of its steps divides by the gradient's own size. Metrics near 0 are means of terms that nearly cancel.
TOLERANCE = {"rel": 1e-5, "abs": 2e-6}
#: A difference of two sums of log-probs, each of about 40 nats a response: a millionth of one of them.
KL_TOLERANCE = {"rel": 1e-5, "abs": 4e-5}
COMPARED = (
    *("actor/pg_loss", "actor/grad_norm", "actor/entropy", "actor/ppo_kl", "actor/kl_loss", "actor/pg_clipfrac"),
    *("critic/vf_loss", "critic/grad_norm", "critic/vpred_mean", "critic/returns/mean"),
    *("kl/reference", "reward/mean", "reward/std", "reward/with_kl_mean", "response_length/mean"),
)

Metrics = dict[str, dict[int, dict[str, float]]]


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> Metrics:
    """One launch for each number of processes does all runs."""
    runs = prepare(tmp_path_factory.mktemp("ppo_layouts"))
    found: Metrics = {}
    for processes in (2, 4, 1):  # those that are loaded come before those that load them
        chosen = {name: run for name, run in RUNS.items() if run.processes == processes}
        commands = {
            name: runs.command(folder_name(name), run.model, run.roles, run.steps, run.load and folder_name(run.load))
            for name, run in chosen.items()
        }
        found |= runs.launch(processes, commands)
    return found


def folder_name(name: str) -> str:
    """Commas and spaces have a meaning in overrides."""
    return name.replace(",", "").replace(" ", "_")


@pytest.mark.parametrize("name", RUNS)
def test_every_layout_takes_the_steps_of_one_process(metrics: Metrics, name: str) -> None:
    run = RUNS[name]
    one = metrics[f"{run.model} on one process"]
    first = RUNS[run.load].steps if run.load else 0
    assert list(metrics[name]) == list(range(first + 1, run.steps + 1))
    for step, values in metrics[name].items():
        for metric in COMPARED:
            tolerance = KL_TOLERANCE if metric == "kl/reference" else TOLERANCE
            assert values[metric] == pytest.approx(one[step][metric], **tolerance), (step, metric)


def test_the_runs_differ_from_step_to_step(metrics: Metrics) -> None:
    """The comparison above would notice a layout that does not train."""
    for model in ("dense", "moe"):
        values = [values["critic/vf_loss"] for values in metrics[f"{model} on one process"].values()]
        assert len({round(value, 4) for value in values}) == NUM_STEPS

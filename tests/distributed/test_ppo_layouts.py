"""The first steps of PPO give the numbers of one process in every layout, and with a layout of its own for each role."""

from __future__ import annotations

from typing import Any

import pytest
from distributed.ppo_runs import NUM_STEPS, PpoRuns, prepare

pytestmark = pytest.mark.slow

DISTRIBUTED = {"optimizer.distributed": True, "ddp.overlap_grad_reduce": True}
GATHERED = {**DISTRIBUTED, "ddp.overlap_param_gather": True}
TP2SP = {"tensor": 2, "sequence": True}
TP2PP2 = {"tensor": 2, "pipeline": 2}
PP2VPP2 = {"pipeline": 2, "virtual_pipeline": 2}

#: (processes, model) -> name -> role -> layout; a role that is not named is data-parallel alone.
RUNS: dict[tuple[int, str], dict[str, dict[str, dict[str, Any]]]] = {
    (2, "dense"): {
        "tp2, pp2, dp2, tp2": {
            "actor": {"tensor": 2},
            "critic": {"pipeline": 2},
            "reward_model": TP2SP,
        },
        "pp2, tp2 sp, interleaved, cp2": {
            "actor": {"pipeline": 2},
            "critic": TP2SP,
            "reference": PP2VPP2,
            "reward_model": {"context": 2},
        },
        "interleaved, cp2": {"actor": PP2VPP2, "critic": {"context": 2}, "reference": {"tensor": 2}},
        "cp2, interleaved, recomputed": {
            "actor": {"context": 2, "recompute": "full"},
            "critic": {**PP2VPP2, "recompute": "selective"},
            "reference": {"context": 2},
        },
        "dp2 distributed optimizers": {"actor": GATHERED, "critic": DISTRIBUTED},
        "tp2 sp recomputed, dp2": {"actor": {**TP2SP, "recompute": "full"}, "reward_model": {"pipeline": 2}},
    },
    (4, "dense"): {
        "tp2 pp2, dp2 tp2, dp2 pp2, dp4": {
            "actor": TP2PP2,
            "critic": {"tensor": 2},
            "reference": {"pipeline": 2},
        },
        "dp4 distributed optimizer, tp2 pp2": {"actor": GATHERED, "critic": TP2PP2, "reward_model": TP2PP2},
        "cp2 tp2 sp, cp2 pp2": {
            "actor": {**TP2SP, "context": 2},
            "critic": {"context": 2, "pipeline": 2},
            "reference": {"context": 4},
            "reward_model": {**TP2SP, **PP2VPP2},
        },
        "interleaved dp2 distributed optimizer, tp2 sp dp2 distributed optimizer": {
            "actor": {**PP2VPP2, **DISTRIBUTED},
            "critic": {**TP2SP, **DISTRIBUTED, "recompute": "full"},
        },
    },
    (2, "moe"): {
        "ep2, pp2": {"actor": {"expert": 2}, "critic": {"pipeline": 2}, "reference": TP2SP},
        "tp2 sp ep2, ep2 distributed optimizer": {
            "actor": {**TP2SP, "expert": 2},
            "critic": {"expert": 2, "recompute": "selective", **DISTRIBUTED},
            "reward_model": {"expert": 2, "context": 2},
        },
    },
    (4, "moe"): {
        "ep2 pp2, ep2 dp4": {
            "actor": {"expert": 2, "pipeline": 2},
            "critic": {"expert": 2, **GATHERED},
            "reference": {**TP2SP, "expert": 4},
            "reward_model": {"expert": 4},
        },
        "tp2 sp ep2 pp2, cp2 ep4": {
            "actor": {**TP2SP, "expert": 2, "pipeline": 2, **DISTRIBUTED},
            "critic": {"context": 2, "expert": 4, "recompute": "full"},
        },
    },
}
CASES = [(processes, model, name) for (processes, model), runs in RUNS.items() for name in runs]

#: fp32 sums in another order: 1e-7 in most metrics of the first step, and what Adam makes of it in the weights of the later ones,
#: since each of its steps divides by the gradient's own size. Metrics near 0 are means of terms that nearly cancel.
TOLERANCE = {"rel": 1e-5, "abs": 2e-6}
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
def one_process(runs: PpoRuns) -> Metrics:
    return runs.launch(1, [runs.command(f"one {model}", model, {}) for model in ("dense", "moe")])


@pytest.fixture(scope="module")
def many_processes(runs: PpoRuns) -> Metrics:
    found: Metrics = {}
    for processes in (2, 4):
        commands = [
            runs.command(f"{processes} {model} {name}".replace(",", ""), model, roles)
            for (wanted, model), layouts in RUNS.items()
            for name, roles in layouts.items()
            if wanted == processes
        ]
        found |= runs.launch(processes, commands)
    return found


@pytest.mark.parametrize(("processes", "model", "name"), CASES)
def test_every_layout_takes_the_steps_of_one_process(
    one_process: Metrics, many_processes: Metrics, processes: int, model: str, name: str
) -> None:
    one = one_process[f"one {model}"]
    many = many_processes[f"{processes} {model} {name}".replace(",", "")]
    assert list(many) == list(one) == list(range(1, NUM_STEPS + 1))
    for step in one:
        for metric in COMPARED:
            assert many[step][metric] == pytest.approx(one[step][metric], **TOLERANCE), (step, metric)


def test_the_runs_differ_from_step_to_step(one_process: Metrics) -> None:
    """The comparison above would notice a layout that does not train."""
    for model in ("dense", "moe"):
        values = [metrics["critic/vf_loss"] for metrics in one_process[f"one {model}"].values()]
        assert len({round(value, 4) for value in values}) == NUM_STEPS

"""The actor as its own generator on two ranks answers as on one, however the layout divides the work."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.helpers.bridge_models import save_case
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.slow

WORKER = "tests/distributed/workers/generation_worker.py"
PROMPTS = [[2 + (5 * i + 3 * j * j) % 120 for j in range(3 + 4 * i)] for i in range(5)]
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor": 2},
    "tp2sp": {"tensor": 2, "sequence": True},
    "dp2": {},
}
CASES = {"qwen3_tied": ("tp2", "tp2sp", "dp2"), "qwen3_moe_untied": ("tp2sp", "dp2")}
RUNS = [(case, layout) for case, layouts in CASES.items() for layout in layouts]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Name of a job -> what each rank saw: one launch of one process, one of two."""
    folder = tmp_path_factory.mktemp("generation")
    for case in CASES:
        save_case(case, folder / case)

    def job(case: str, layout: dict[str, Any]) -> dict[str, Any]:
        return {"layout": layout, "checkpoint": str(folder / case), "prompts": PROMPTS}

    jobs = {
        1: {f"{case}-one": job(case, {}) for case in CASES},
        2: {f"{case}-{layout}": job(case, LAYOUTS[layout]) for case, layout in RUNS},
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for num_processes, some in jobs.items():
        path, out = folder / f"jobs_{num_processes}.json", folder / f"results_{num_processes}.json"
        path.write_text(json.dumps(some))
        run_ranks(num_processes, [WORKER, str(path), str(out)])
        found |= json.loads(out.read_text())
    return found


@pytest.mark.parametrize(("case", "layout"), RUNS)
def test_two_ranks_answer_as_one(results: dict[str, list[dict[str, Any]]], case: str, layout: str) -> None:
    (one,) = results[f"{case}-one"]
    first, second = results[f"{case}-{layout}"]
    expected = [response for group in one["answers"] for response in group]
    assert {response["finish_reason"] for response in expected} == {"stop", "length"}
    assert first["answers"] == second["answers"], "every rank has all answers, to the last bit"
    found = [response for group in first["answers"] for response in group]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours["token_ids"], ours["finish_reason"]) == (theirs["token_ids"], theirs["finish_reason"])
        assert ours["log_probs"] == pytest.approx(theirs["log_probs"], abs=1e-4)
    assert first["probe"] == pytest.approx(one["probe"], abs=1e-4)


@pytest.mark.parametrize(("case", "layout"), RUNS)
def test_every_rank_is_told_of_every_response_in_one_order(
    results: dict[str, list[dict[str, Any]]], case: str, layout: str
) -> None:
    first, second = results[f"{case}-{layout}"]
    assert first["reported"] == second["reported"]
    assert sorted(first["reported"]) == [[prompt, sample] for prompt in range(len(PROMPTS)) for sample in range(2)]

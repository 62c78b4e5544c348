"""The table of faults: each is a real one, at a point that the program has. The runs themselves are the benchmark's."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from hetero_ppo.engines.train_engine import TrainEngine

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import faults
import faults_cases
import faults_worker
from faults_compare import compare, differing_bytes
from faults_scenarios import Outcome

CASES = faults_cases.cases()
CALLS = [case.point["point"] for case in CASES if case.point is not None and case.point["point"].startswith("call:")]
SOURCES = "".join(
    (BENCHMARKS.parent / "hetero_ppo" / name).read_text()
    for name in ("trainers/ppo.py", "experience/pipeline.py", "experience/stages.py", "step/phases.py")
)


def test_there_are_sixty_faults_each_of_one_kind() -> None:
    assert len(CASES) >= 60
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.kind for case in CASES} == {"point", "blows", "damage", "disk", "folder", "flag"}
    assert sum(case.engine == "vllm" for case in CASES) >= 15


@pytest.mark.parametrize("point", sorted(set(CALLS)))
def test_every_point_is_in_the_program(point: str) -> None:
    _, module, path = point.split(":")
    owner = importlib.import_module(module)
    for name in path.split("."):
        owner = vars(owner)[name]
    assert callable(owner)


@pytest.mark.parametrize("phase", faults_cases.PHASES)
def test_every_phase_is_one_of_a_step(phase: str) -> None:
    assert f'"{phase}"' in SOURCES or f'"train_{phase}"' in SOURCES


def test_differing_bytes() -> None:
    assert differing_bytes(b"abcd", b"abcd") == 0
    assert differing_bytes(b"abXdef", b"abcd") == 3


def test_a_fault_happens_once_at_its_step_on_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    kills: list[tuple[int, int]] = []
    monkeypatch.setattr(faults_worker.os, "kill", lambda pid, number: kills.append((pid, number)))
    fault = faults_worker.Fault("phase:values", 1, "kill", rank=1)
    fault._happen()
    assert kills == []  # no step is logged
    fault.steps_logged = 1
    fault._happen()
    fault._happen()
    assert len(kills) == 1
    other = faults_worker.Fault("phase:values", 0, "kill", rank=0)
    other._happen()
    assert len(kills) == 1
    of_role = faults_worker.Fault(
        "call:hetero_ppo.engines.train_engine:TrainEngine.save", 0, "kill", rank=1, role="critic"
    )
    engine = object.__new__(TrainEngine)
    engine.role = "actor"
    assert not of_role._is_of_the_role((engine,))


def write_checkpoint(run_dir: Path, *, coef: float, moments: bytes) -> None:
    folder = run_dir / "checkpoints" / "iter_0000004"
    (folder / "actor").mkdir(parents=True)
    (folder / "actor" / "__0_0.distcp").write_bytes(moments)
    state = {
        "step": 4,
        "kl_controller": {"coef": coef},
        "run_id": run_dir.name,
        "metrics": {"score": 1.0, "rollout/x": coef, "time_s": coef},
    }
    (folder / "trainer.json").write_text(json.dumps(state))
    (folder / "config.yaml").write_text(f"run: {{dir: {run_dir}}}\nkind: ppo\n")
    (folder / "COMPLETE").write_text(run_dir.name)
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 4, "metrics": state["metrics"]}) + "\n")


def test_all_that_a_checkpoint_holds_is_compared(tmp_path: Path) -> None:
    for name, coef, moments in (("a", 0.5, b"1234"), ("b", 0.5, b"1234"), ("c", 0.7, b"12X4")):
        write_checkpoint(tmp_path / name, coef=coef, moments=moments)
    assert compare(tmp_path / "a", tmp_path / "b", 4) == {}
    found = compare(tmp_path / "a", tmp_path / "c", 4)
    parts = {"actor/__0_0.distcp": 1, "metrics": 1, "trainer.json: kl_controller": 1, "trainer.json: metrics": 1}
    assert found == parts
    found = compare(tmp_path / "a", tmp_path / "c", 4, replayed=True)
    assert found == {"actor/__0_0.distcp": 1, "trainer.json: kl_controller": 1}
    (tmp_path / "b" / "checkpoints" / "iter_0000004" / "actor" / "more").write_bytes(b"123")
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"st')
    assert compare(tmp_path / "a", tmp_path / "b", 4) == {"actor/more": 3, "torn lines of metrics.jsonl": 4}


def test_a_table_that_was_killed_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    table = faults.Table(path, go_on=False)
    table.add(Outcome("SIGTERM", survived=True, end_s=3.0))
    table.add(Outcome("SIGINT", differing={"metrics": 2}))
    written = json.loads(path.read_text())
    assert (
        written["survived"],
        written["total"],
        written["bytes_differing_after_resume"],
        written["sigterm_exit_s"],
    ) == (1, 2, 2, 3.0)
    assert [outcome.name for outcome in faults.Table(path, go_on=True).outcomes] == ["SIGTERM"]
    assert faults.Table(path, go_on=False).outcomes == []


def test_a_sample_fits_into_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Runs:
        def run(self, case: faults_cases.Case) -> Outcome:
            now[0] += 50.0
            return Outcome(case.name, survived=True)

    monkeypatch.setattr(faults.time, "monotonic", lambda: now[0])
    table = faults.Table(None, go_on=False)
    faults.run_cases(Runs(), CASES, table, 4.0, 1)
    assert [outcome.name for outcome in table.outcomes] == [case.name for case in CASES[:4]]


def test_a_torn_file_has_half_of_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")

    def strike(pid: int, number: int) -> None:
        raise InterruptedError

    monkeypatch.setattr(faults_worker.os, "kill", strike)
    fault = faults_worker.Fault("write:*/state.json", 1, "kill")
    torn_open = fault._tearing(open, "*/state.json")
    for name, logged in (("state.json", 0), ("other.json", 1)):
        fault.steps_logged = logged
        with torn_open(tmp_path / name, "w") as file:
            file.write("whole")
        assert (tmp_path / name).read_text() == "whole"
    with pytest.raises(InterruptedError), torn_open(tmp_path / "state.json", "wb") as file:
        file.write(b"12345678")
    assert (tmp_path / "state.json").read_bytes() == b"1234" and fault.has_happened

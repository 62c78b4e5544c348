"""The table of faults: each is a real one, at a point that the program has. The runs themselves are the benchmark's."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from hetero_ppo.engines.train_engine import TrainEngine

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import faults
import faults_cases
import faults_worker

CASES = faults_cases.cases()
CALLS = [case.point["point"] for case in CASES if case.point is not None and case.point["point"].startswith("call:")]
SOURCES = "".join(
    (BENCHMARKS.parent / "hetero_ppo" / name).read_text()
    for name in ("trainers/ppo.py", "experience/pipeline.py", "experience/stages.py", "memory/turns.py")
)


def test_there_are_thirty_faults_each_of_one_kind() -> None:
    assert len(CASES) >= 30
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert sum([case.point is not None, bool(case.signals), case.damage is not None, case.disk is not None]) == 1


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
    assert faults.differing_bytes(b"abcd", b"abcd") == 0
    assert faults.differing_bytes(b"abXdef", b"abcd") == 3


def interrupt(seconds: float) -> None:
    raise InterruptedError


def test_a_fault_happens_once_at_its_step_on_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    kills: list[tuple[int, int]] = []
    monkeypatch.setattr(faults_worker.os, "kill", lambda pid, number: kills.append((pid, number)))
    monkeypatch.setattr(faults_worker.time, "sleep", interrupt)
    fault = faults_worker.Fault("phase:values", 1, "kill", rank=1)
    fault._happen()
    assert kills == []  # no step is logged
    fault.steps_logged = 1
    with pytest.raises(InterruptedError):
        fault._happen()
    assert len(kills) == 1
    other = faults_worker.Fault("phase:values", 0, "kill", rank=0)
    other._happen()
    assert len(kills) == 1
    of_role = faults_worker.Fault("call:hetero_ppo.engines.train_engine:TrainEngine.save", 0, "kill", rank=1, role="critic")
    engine = object.__new__(TrainEngine)
    engine.role = "actor"
    assert not of_role._is_of_the_role((engine,))

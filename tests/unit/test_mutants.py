"""The list of mutants applies to the code, and the fast ones die. The others: ``python benchmarks/mutants.py``."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import get_type_hints

import pytest
from tests.helpers.ranks import ENVIRONMENT, outer_environment

from hetero_ppo.config.field_types import item_class, section_class
from hetero_ppo.config.schema import SCHEMAS, SamplingConfig

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import mutants as gate

#: Groups of options, each of whose options has a mutant: the name of the option, or what it does, is in the mutant's.
AREAS = {
    *("algorithm", "reward", "kl", "optimizer", "supervised", "data", "pipeline", "residency", "weight sync"),
    *("checkpoint", "mismatch", "aligned", "log-probs", "sampling", "stopping", "partial rollouts", "cuda"),
    *("batching", "evaluation", "layout", "rollout", "run"),
}
MUTANT = gate.Mutant("a mutant", "kl", "code.py", "x + 1", "x - 1", "test_code.py::test_it")


def test_every_edit_applies_to_the_code_of_today() -> None:
    mutants = gate.read_mutants()
    assert gate.check(mutants) == []
    assert len(mutants) >= 80 and {mutant.area for mutant in mutants} == AREAS
    assert 15 <= sum(mutant.fast for mutant in mutants) <= 30


def options_of(section: type) -> set[str]:
    """Return the options of a section and of those in it, each as the class that declares it and its name."""
    found = set()
    for option in fields(section):
        hint = get_type_hints(section)[option.name]
        inner = section_class(hint) or item_class(hint)
        declares = next(one for one in reversed(section.__mro__) if option.name in inspect.get_annotations(one))
        if inner is None or inner is SamplingConfig:  # there are two of it: each has to reach its place
            found.add(f"{declares.__name__}.{option.name}")
        found |= set() if inner is None else options_of(inner)
    return found


def test_every_option_has_a_mutant_or_a_reason() -> None:
    """An edit that makes the code ignore the option: ``options`` of a table in mutants.toml."""
    options = set().union(*(options_of(section) for section in SCHEMAS.values()))
    mutated = {option for mutant in gate.read_mutants() for option in mutant.options}
    exempt = gate.read_exempt_options()
    assert mutated - options == exempt.keys() - options == set(), "no such option"
    assert mutated & exempt.keys() == set(), "it has a mutant, so it needs no reason"
    assert options - mutated - exempt.keys() == set(), "add a mutant that ignores it, and a test that fails then"
    assert all(len(reason.split()) > 3 for reason in exempt.values())
    assert {"KlConfig.clamp", "RoleConfig.aligned", "RolloutConfig.eval_sampling", "RmConfig.kind"} <= options and len(
        options
    ) > 160


@pytest.mark.slow
def test_the_fast_mutants_die() -> None:
    """Each is one edit of a copy of the tree; that their tests pass without it is for these tests themselves to show."""
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "mutants.py"), "--fast", "--no-baseline", "--jobs", "1"]
    environment = {**outer_environment(), **ENVIRONMENT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["survived"] == figures["errors"] == 0 and figures["total"] >= 15


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "code.py").write_text("y = x + 1\n")
    (tmp_path / "test_code.py").write_text("def test_it() -> None: ...\n")
    return tmp_path


def test_an_edit_changes_one_place(root: Path) -> None:
    assert gate.mutated(MUTANT, root) == "y = x - 1\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old": "x + 2"}, "has the old text 0 times"),
        ({"old": "x"}, None),
        ({"old": " "}, "has the old text 4 times"),
        ({"new": "x + 1"}, "has the old text 1 times"),
        ({"new": "x +"}, "the edit is no Python"),
        ({"test": "test_code.py::test_another"}, "there is no test"),
        ({"file": "gone.py"}, "no file that can be mutated"),
        ({"file": "megatron_bridge/platform/__init__.py"}, "no file that can be mutated"),
    ],
)
def test_an_edit_that_does_not_apply_is_an_error(root: Path, change: dict[str, str], message: str | None) -> None:
    errors = gate.check([replace(MUTANT, **change)], root)
    assert errors == [] if message is None else message in errors[0]


def test_the_list_is_checked(tmp_path: Path) -> None:
    table = "\n".join(f'{name} = "{value}"' for name, value in vars(MUTANT).items() if isinstance(value, str))
    path = tmp_path / "mutants.toml"
    for text, message in (
        (f"[[mutant]]\n{table}\nwhy = 1", "unknown fields"),
        (f"[[mutant]]\n{table}\n" * 2, "come twice"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            gate.read_mutants(path)


def test_what_becomes_of_a_mutant() -> None:
    passed = {"failed": None, "broken": None, "seconds": {}}
    assert gate.result_of(MUTANT, passed, 1.0, is_late=False).outcome == "survived"
    assert gate.result_of(MUTANT, passed, 1.0, is_late=True).outcome == "killed"
    assert gate.result_of(MUTANT, {**passed, "failed": "test_it"}, 1.0, is_late=False).outcome == "killed"
    assert gate.result_of(MUTANT, {**passed, "broken": "SyntaxError"}, 1.0, is_late=False).outcome == "error"


def test_patterns_choose_by_name_and_area() -> None:
    other = replace(MUTANT, name="another", area="data", fast=True)
    assert gate.chosen([MUTANT, other], ["kl"], fast=False) == [MUTANT]
    assert gate.chosen([MUTANT, other], ["a*other"], fast=False) == [other]
    assert gate.chosen([MUTANT, other], ["*"], fast=True) == [other]

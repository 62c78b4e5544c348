"""The words of the sources and of the documentation, and the checker that looks at them (tests/helpers/language.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers import language
from tests.helpers.language import ROOT

MODULES = [path for package in ("hetero_ppo", "megatron_bridge") for path in sorted((ROOT / package).rglob("*.py"))]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
#: Least share of functions whose docstrings begin with an imperative verb.
LEAST_SHARE = 0.95
#: The name under which a run's start is stored; "begun" of a response is a partial response.
START_OF_A_RUN = ROOT / "hetero_ppo" / "runtime" / "resume.py"


def test_docstrings_of_functions_begin_with_a_verb() -> None:
    found = list(language.documented(MODULES))
    others = [f"{one.place}: {one.docstring.splitlines()[0]}" for one in found if not one.begins_with_a_verb]
    assert len(found) > 500 and len(others) <= (1 - LEAST_SHARE) * len(found), "\n".join(others)


def test_no_text_of_an_argument_is_a_fragment() -> None:
    assert list(language.fragments(MODULES)) == []


def test_no_term_of_the_glossary_is_left() -> None:
    assert list(language.unused_terms(path for path in [*MODULES, *PAGES] if path != START_OF_A_RUN)) == []


def test_no_two_classes_have_one_name() -> None:
    assert {name: places for name, places in language.classes(MODULES).items() if len(places) > 1} == {}


SOURCE = '''
class Twice: ...
class Twice: ...

def right(rows: int) -> int:
    """Return the rows.

    Args:
        rows: Number of rows, whatever they
            are of: see there.

    Raises:
        ValueError: Nothing is left.
    """

def fragment(rows: int, size: int) -> None:
    """Of the rows that are wanted.

    Args:
        rows: of a batch.
        size: What it holds.
        more:
    """

class One:
    @property
    def rows(self) -> int:
        """Number of rows."""

@pytest.fixture
def made() -> None:
    """A file."""

def test_it() -> None:
    """The file is there."""
'''


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setattr(language, "ROOT", tmp_path)
    (tmp_path / "source.py").write_text(SOURCE)
    return [tmp_path / "source.py"]


def test_the_checker_reads_functions_but_no_values_fixtures_and_tests(source: list[Path]) -> None:
    found = {one.place: one.begins_with_a_verb for one in language.documented(source)}
    assert found == {"source.py:5": True, "source.py:16": False}


def test_the_checker_finds_fragments_terms_and_names(source: list[Path]) -> None:
    assert list(language.fragments(source)) == ["source.py:16: rows: of a batch.", "source.py:16: size: What it holds."]
    (line,) = language.unused_terms(source)
    assert line.startswith("source.py:17: write num_needed") and line.endswith("Of the rows that are wanted.")
    assert language.classes(source)["Twice"] == ["source.py:2", "source.py:3"]

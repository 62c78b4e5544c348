"""The word-sort demo: its data, its mistakes and its exact check."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "word_sort"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"word_sort_{name}", DEMO / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


make_data = load("make_data")
exact = load("check").exact

SMALL = make_data.Recipe(
    sft_rows=400, sft_eval_rows=40, preference_rows=400, preference_eval_rows=100, prompt_rows=100, heldout_rows=50
)


@pytest.fixture(scope="module")
def files() -> dict[str, list[dict]]:
    return make_data.make_rows(7, SMALL)


def user_text(row: dict) -> str:
    return row["messages"][0]["content"] if "messages" in row else row["prompt"]


def prompt_words(row: dict) -> list[str]:
    return user_text(row).split(": ")[1].split(" ")


def right_answer(row: dict) -> str:
    return "Sorted: " + " ".join(sorted(prompt_words(row)))


def test_same_seed_same_rows(files: dict[str, list[dict]]) -> None:
    assert make_data.make_rows(7, SMALL) == files
    assert make_data.make_rows(8, SMALL) != files


def test_no_set_of_words_twice(files: dict[str, list[dict]]) -> None:
    sets = Counter(frozenset(prompt_words(row)) for rows in files.values() for row in rows)
    assert max(sets.values()) == 1
    assert sum(sets.values()) == 400 + 40 + 400 + 100 + 100 + 50


def test_prompts_name_distinct_known_words(files: dict[str, list[dict]]) -> None:
    for row in files["prompts.jsonl"] + files["heldout.jsonl"]:
        words = prompt_words(row)
        assert len(set(words)) == len(words)
        assert set(words) <= set(make_data.WORDS)
        assert row["metadata"]["words"] == words
        assert SMALL.min_words <= len(words) <= SMALL.max_words


def test_labels_are_the_sorted_prompt(files: dict[str, list[dict]]) -> None:
    for row in files["prompts.jsonl"] + files["heldout.jsonl"]:
        assert row["label"] == right_answer(row)
        assert exact(row["prompt"], row["label"], row["label"], row["metadata"]) == 1.0


def test_evaluation_pairs_are_right_and_wrong(files: dict[str, list[dict]]) -> None:
    for row in files["preference_eval.jsonl"]:
        right = right_answer(row)
        assert row["chosen"] == right
        assert row["rejected"] != right


def test_training_pairs_have_label_noise(files: dict[str, list[dict]]) -> None:
    exchanged = 0
    for row in files["preference.jsonl"]:
        right = right_answer(row)
        assert (row["chosen"] == right) != (row["rejected"] == right)
        exchanged += row["rejected"] == right
    assert 0 < exchanged < 0.08 * len(files["preference.jsonl"])


def test_demonstrations_are_visibly_imperfect(files: dict[str, list[dict]]) -> None:
    rows = files["sft.jsonl"]
    right = sum(row["messages"][1]["content"] == right_answer(row) for row in rows)
    assert 0.4 < right / len(rows) < 0.75


@pytest.mark.parametrize("kind", make_data.SLIPS)
def test_every_slip_makes_the_answer_wrong(kind: str) -> None:
    answer = ["bean", "cake", "fern", "lake"]
    sizes = {"swap": {4}, "drop": {3}, "repeat": {4, 5}, "foreign": {4}}
    seen = set()
    for seed in range(50):
        words = make_data.slip(random.Random(seed), answer, kind)
        assert words != answer
        seen.add(len(words))
        assert (Counter(words) == Counter(answer)) == (kind == "swap")
        assert (set(words) - set(answer) != set()) == (kind == "foreign")
        assert (len(set(words)) < len(words)) == (kind == "repeat")
    assert seen == sizes[kind]
    assert answer == ["bean", "cake", "fern", "lake"]


def test_unknown_slip_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown kind of slip 'typo'"):
        make_data.slip(random.Random(0), ["bean", "cake"], "typo")


def test_hasty_order_looks_at_the_first_letter_alone() -> None:
    assert make_data.hasty_order(["tile", "cave", "bean", "cake"]) == ["bean", "cave", "cake", "tile"]


def test_mistaken_answers_are_never_right() -> None:
    rng = random.Random(3)
    for task in make_data.draw_tasks(rng, 300, SMALL, set()):
        assert make_data.mistaken(rng, task) != task.label


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("bean cake fern", 1.0),
        (" bean cake fern\n", 1.0),
        ("bean fern cake", 0.0),
        ("bean cake", 0.0),
        ("bean cake fern fern", 0.0),
        ("bean cake farm", 0.0),
        ("bean, cake, fern", 0.0),
        ("Bean cake fern", 0.0),
        ("beancake fern", 0.0),
        ("", 0.0),
    ],
)
def test_exact(response: str, score: float) -> None:
    assert exact("Sort these words from A to Z: fern bean cake", response, "bean cake fern", {}) == score


@pytest.mark.parametrize("label", [None, "", ["bean"]])
def test_exact_needs_a_label(label: object) -> None:
    with pytest.raises(ValueError, match="needs the right answer as label"):
        exact("Sort these words from A to Z: bean", "bean", label, {})


def test_command_line_writes_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_data, "Recipe", lambda: SMALL)
    make_data.main(["--out", str(tmp_path / "data"), "--seed", "7"])
    for name, rows in make_data.make_rows(7, SMALL).items():
        lines = (tmp_path / "data" / name).read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows


def test_help_runs_as_a_script() -> None:
    done = subprocess.run([sys.executable, DEMO / "make_data.py", "--help"], capture_output=True, text=True, check=True)
    assert "--seed" in done.stdout

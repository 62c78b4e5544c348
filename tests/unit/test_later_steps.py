"""A line that a kill has cut is repaired when a run resumes, and skipped by a report; steps that are done again are there once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hetero_ppo.observability.jsonl import cut, whole_lines
from hetero_ppo.observability.records import read_run
from hetero_ppo.runtime.later_steps import forget_later_steps


def line(step: int) -> str:
    return json.dumps({"step": step, "time": float(step), "metrics": {"train/loss": 1.0}, "seconds": {}}) + "\n"


def leave_files(folder: Path, tail: str) -> None:
    (folder / "metrics.jsonl").write_text("".join(map(line, range(1, 6))) + tail)
    for name, suffix in (("rollouts", "jsonl"), ("trace", "json")):
        (folder / name).mkdir()
        for step in range(1, 6):
            (folder / name / f"step_{step:06d}.{suffix}").touch()


@pytest.mark.parametrize(
    "tail", ["", line(6)[:20], "\0\0\0"], ids=["whole", "torn", "zeros after a crash of the machine"]
)
def test_steps_after_the_checkpoint_are_there_once(tmp_path: Path, tail: str) -> None:
    leave_files(tmp_path, tail)
    (tmp_path / "eval_before.json").touch()
    (tmp_path / "eval_after.json").touch()
    messages = forget_later_steps(tmp_path, 3, replayed=None)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(map(line, (1, 2, 3)))
    torn = ", a last line that a kill had cut removed" if tail else ""
    assert messages[0] == f"metrics.jsonl: 2 records of steps after 3, which are done again, removed{torn}"
    assert messages[1].startswith("eval_after.json: removed") and (tmp_path / "eval_before.json").exists()
    for name in ("rollouts", "trace"):
        assert sorted(path.stem for path in (tmp_path / name).iterdir()) == [f"step_{step:06d}" for step in (1, 2, 3)]
    assert forget_later_steps(tmp_path, 3, replayed=None) == []


def test_rollouts_that_are_replayed_stay(tmp_path: Path) -> None:
    leave_files(tmp_path, "")
    forget_later_steps(tmp_path, 3, replayed=tmp_path / "trace" / ".." / "rollouts")
    assert len(list((tmp_path / "rollouts").iterdir())) == 5


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + line(2)[:20] + line(3) + line(4))
    found = cut(path, lambda record: True)
    assert found.describe("metrics.jsonl", "records") == "metrics.jsonl: damaged lines removed: 2"
    assert path.read_text() == line(1) + line(4)


def test_a_report_reads_past_a_torn_last_line(tmp_path: Path) -> None:
    """A killed run leaves such a line, and so does one that is writing it."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + line(2) + line(3)[:20])
    assert read_run(tmp_path).num_steps == 2
    path.write_text(line(1) + line(2).removesuffix("\n"))
    assert read_run(tmp_path).num_steps == 2
    path.write_text(line(1)[:20] + "\n" + line(2))
    with pytest.raises(ValueError, match="metrics.jsonl, line 1: not a metrics record"):
        read_run(tmp_path)


def test_lines_of_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert whole_lines(tmp_path / "empty") == []

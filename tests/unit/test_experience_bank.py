"""The bank's files: what a kill leaves of them, and what belongs to another run."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from hetero_ppo.experience.bank import RolloutBank, bank_key
from hetero_ppo.types import Response

ONE = Response([5, 6], [-0.1, -2.5], "stop", "step3")
RESUMED = Response([7], [-1.0 / 3], "length", "step3", (("step2", 1),))


def test_what_was_added_is_there_after_a_kill(tmp_path: Path) -> None:
    bank = RolloutBank(tmp_path, resumes=False)
    assert bank.begin(3, "key") == []
    bank.add(4, ONE)
    bank.add(0, RESUMED)
    path = tmp_path / "step_000003.jsonl"
    path.write_bytes(path.read_bytes() + b'0a1b2c3d {"place": 1, "resp')  # the process ended inside a line
    bank = RolloutBank(tmp_path, resumes=True)
    assert bank.begin(3, "key") == [(4, ONE), (0, RESUMED)]
    bank.add(1, ONE)
    assert bank.begin(3, "key") == [(4, ONE), (0, RESUMED), (1, ONE)]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_damaged_lines_are_dropped_and_counted_and_the_rest_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A bit in a token, in a log-prob, in a checksum, in a line's end, in the key: each costs its line, and nothing wrong is used."""
    records = caplog.records
    bank = RolloutBank(tmp_path, resumes=False)
    bank.begin(3, "key")
    for place in range(6):
        bank.add(place, ONE)
    path = tmp_path / "step_000003.jsonl"
    intact = path.read_bytes()
    starts = [0, *(i + 1 for i, byte in enumerate(intact) if byte == ord("\n"))]  # of the key's line, of place 0, ...
    for position, lost in [
        (intact.index(b"[5, 6]", starts[2]) + 1, {1}),
        (intact.index(b"-2.5", starts[3]) + 3, {2}),
        (starts[4], {3}),
        (starts[5] - 1, {3, 4}),  # two lines are one
    ]:
        path.write_bytes(intact)
        flip(path, position)
        expected = [(place, ONE) for place in range(6) if place not in lost]
        assert bank.begin(3, "key") == expected
        assert re.search(r"step_000003.jsonl: 1 of \d responses are damaged and dropped", records.pop().message)
        bank.add(min(lost), RESUMED)  # the generator has answered again
        assert bank.begin(3, "key") == [*expected, (min(lost), RESUMED)] and not records
    path.write_bytes(intact)
    flip(path, 2)
    assert bank.begin(3, "key") == []
    assert (
        "its first line, which says whose responses they are, is damaged: its 6 responses are dropped"
        in records.pop().message
    )


def test_lines_of_an_older_version_have_no_checksum_and_are_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = caplog.records
    lines = [{"key": "key"}, {"place": 0, "response": asdict(ONE)}]
    (tmp_path / "step_000003.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    bank = RolloutBank(tmp_path, resumes=True)
    assert bank.begin(3, "key") == []
    assert "an older version wrote it, without checksums: its 1 responses are dropped" in records.pop().message
    bank.add(0, ONE)
    assert bank.begin(3, "key") == [(0, ONE)] and not records


def test_responses_of_another_key_are_dropped(tmp_path: Path) -> None:
    bank = RolloutBank(tmp_path, resumes=False)
    bank.begin(0, bank_key(weights="a", seed=1))
    bank.add(0, ONE)
    assert bank.begin(0, bank_key(weights="a", seed=2)) == []
    assert bank.begin(0, bank_key(weights="a", seed=1)) == []
    for text in ("", '{"key'):
        (tmp_path / "step_000007.jsonl").write_text(text)
        assert bank.begin(7, "key") == []


def test_steps_behind_a_checkpoint_and_other_runs_are_forgotten(tmp_path: Path) -> None:
    bank = RolloutBank(tmp_path, resumes=False)
    for step in (0, 1, 2):
        bank.begin(step, "key")
    bank.forget(2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000002.jsonl"]
    RolloutBank(tmp_path, resumes=False)
    assert list(tmp_path.iterdir()) == []

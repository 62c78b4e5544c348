"""The bank's files: what a kill leaves of them, and what belongs to another run."""

from __future__ import annotations

from pathlib import Path

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
    path.write_bytes(path.read_bytes() + b'{"place": 1, "resp')  # the process ended inside a line
    bank = RolloutBank(tmp_path, resumes=True)
    assert bank.begin(3, "key") == [(4, ONE), (0, RESUMED)]
    bank.add(1, ONE)
    assert bank.begin(3, "key") == [(4, ONE), (0, RESUMED), (1, ONE)]


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

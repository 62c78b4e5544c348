"""A rank that waits for one that has gone, or does not come, says so in bounded time: its rank, its phase, the peer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.helpers.ranks import run_ranks

from hetero_ppo.distributed.lost_peer import describe_lost_peer

pytestmark = pytest.mark.slow

WORKER = str(Path(__file__).with_name("workers") / "lost_peer_worker.py")


@pytest.mark.parametrize(
    ("what", "message", "least_s"),
    [
        ("ended", r"the peer at [\d.]+:\d+ has ended", 0.0),
        ("late", r"a peer did not come to a collective within run.timeout_minutes=0.0333333", 1.9),
    ],
)
def test_a_collective_names_who_waits_where_for_whom(what: str, message: str, least_s: float, tmp_path: Path) -> None:
    text = run_ranks(2, [WORKER, what, str(tmp_path / "reported")])
    found = re.search(rf"^([\d.]+) rank 0, phase train_critic: {message}\. ", text, re.MULTILINE)
    assert found is not None, text
    assert least_s < float(found[1]) < 20


def test_other_errors_are_not_a_peers() -> None:
    assert describe_lost_peer(RuntimeError("the engine's log-probs differ"), "weight_sync", 30.0) is None

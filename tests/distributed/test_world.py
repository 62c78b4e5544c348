"""Ranks find and recognise each other; see hetero_ppo/distributed/world.py and hetero_ppo/peer_proof.py."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.ranks import run_ranks

WORKER = str(Path(__file__).parent / "workers" / "world_worker.py")


def test_ranks_know_each_other_and_listen_on_loopback_alone() -> None:
    text = run_ranks(2, [WORKER])
    assert text.count("HETERO_PPO_RUN_KEY is not set: ranks cannot tell each other from strangers") == 1

"""The placement of a run as a value: the ranks that each role lives on. Process groups and the owner of the generator follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hetero_ppo.config.load import AnyConfig
from hetero_ppo.step.roles import run_roles


@dataclass(frozen=True)
class Placement:
    """Ranks that each role lives on. Roles on the same ranks take turns there; roles without a common rank run at the same time."""

    ranks: Mapping[str, Sequence[int]]  # role -> its ranks, in ascending order
    # Rank that owns the generator: it sends the requests, and broadcasts the responses to the others.
    generator_rank: int


def run_placement(config: AnyConfig, world_size: int) -> Placement:
    """Return the placement of a run: every role lives on all ranks, and rank 0 owns the generator.

    Args:
        config: Checked configuration of the run.
        world_size: Number of ranks.
    """
    return Placement(dict.fromkeys(run_roles(config), range(world_size)), generator_rank=0)

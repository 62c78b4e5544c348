"""Joins worlds whose members have the same key, different keys, and a member that only seems to be of the run, on both ranks.

usage: world_worker.py
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers.generator_requests import prompts_of

from hetero_ppo.config.schema import SamplingConfig
from hetero_ppo.distributed import groups
from hetero_ppo.distributed.groups import finish, initialise
from hetero_ppo.distributed.world import RUN_KEY
from hetero_ppo.errors import RunError
from hetero_ppo.experience.pending_rollout import collect_rollout
from hetero_ppo.reward import self_check
from hetero_ppo.rollout.generator import Capabilities, GenerationRequest, NullGenerator
from hetero_ppo.types import OnResponse, Response


def listening() -> set[str]:
    """Return the addresses on which this process listens, as /proc/net shows them."""
    own = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        if descriptor.is_symlink():
            own.add(os.readlink(descriptor))
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own}


class Answers(NullGenerator):
    """Is on this rank, and answers one prompt with one response."""

    is_here = True

    def generate(
        self,
        request: GenerationRequest,
        *,
        on_response: OnResponse | None = None,
        on_stalled: Callable[[], None] | None = None,
    ) -> list[list[Response]]:
        assert on_response is not None
        response = Response([7, 8, 2], [-1.0, -2.0, -3.0], "stop", "step0")
        on_response(0, 0, response)
        return [[response]]


def main() -> None:
    rank = int(os.environ["RANK"])
    os.environ[RUN_KEY] = "of the run"
    world = initialise(1.0)
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total, group=world)
    assert float(total) == 3.0 and listening() == {"0100007F"}, listening()
    # A fault of one rank's device is known to all, so that all build the same layers.
    assert self_check._agreed("the fault of rank 1" if rank else None, world) == "the fault of rank 1"
    assert self_check._agreed(None, world) is None
    alone = groups._group([[0], [1]])  # of a role that lives on one rank
    assert alone is not None and self_check._agreed(f"the fault of rank {rank}", alone) == f"the fault of rank {rank}"
    generator = NullGenerator(Capabilities()) if rank == 0 else Answers(Capabilities())
    request = GenerationRequest(prompts_of([[5, 6]]), SamplingConfig(max_tokens=3), n=1, seed=0)
    rollout = collect_rollout(generator, request, world, generator_rank=1, version="step0")
    assert rollout.token_ids.tolist() == [[5, 6, 7, 8, 2]]
    group = groups._group([[0, 1]])
    assert group is not None and group.size() == 2
    if rank == 1:
        groups._made.key = b"of somebody else"
    with pytest.raises(
        RunError,
        match=rf"rank {rank} of 2 in group 2 .*the process that connected as rank {1 - rank} is not part of this run",
    ):
        groups._group([[1, 0]])
    finish()
    os.environ[RUN_KEY] = f"of node {rank}"
    with pytest.raises(ValueError, match="HETERO_PPO_RUN_KEY is not the same on all nodes"):
        initialise(1.0)
    os.environ[RUN_KEY] = ""
    initialise(1.0)  # started by hand, without a key: as it always was
    assert groups._made.key is None
    dist.barrier()
    finish()


if __name__ == "__main__":
    main()

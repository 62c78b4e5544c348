"""A rollout that is under way shows its progress."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
from tqdm import tqdm
from tests.helpers.generator_requests import prompts_of
from tests.helpers.one_rank import ONE_RANK

from hetero_ppo.config.schema import SamplingConfig
from hetero_ppo.experience import pending_rollout
from hetero_ppo.experience.pending_rollout import PendingRollout
from hetero_ppo.observability.progress import progress
from hetero_ppo.rollout.generator import Capabilities, GenerationRequest, NullGenerator
from hetero_ppo.types import OnResponse, Response

DONE = Response([7], [-0.5], "stop", "step0")


class OneByOne(NullGenerator):
    """Answers with one response after the other, and records what the terminal shows after each."""

    is_here = True
    terminal: io.StringIO

    def generate(
        self, request: GenerationRequest, *, on_response: OnResponse | None = None, **_: object
    ) -> list[list[Response]]:
        self.shown: list[str] = []
        for prompt in range(len(request.prompts)):
            assert on_response is not None
            on_response(prompt, 0, DONE)
            self.shown.append(self.terminal.getvalue().rpartition("\r")[2])
        return [[DONE]] * len(request.prompts)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def eager(**options: Any) -> tqdm:
    """Return the bar of ``progress``, which prints every update."""
    bar = progress(**options)
    assert isinstance(bar, tqdm)
    bar.mininterval = 0.0
    return bar


def test_a_bar_on_the_terminal_counts_responses_and_goes_with_the_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bank had the first response. The bar of the steps, which is around it, keeps its place."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(pending_rollout, "progress", eager)
    generator = OneByOne(Capabilities(is_collective=True, can_resume=True))
    generator.terminal = sys.stderr
    request = GenerationRequest(prompts_of([[3], [4], [5]]), SamplingConfig(max_tokens=1), n=1, seed=0)
    pending = PendingRollout(
        generator, request, ONE_RANK, generator_rank=0, version="step0", chunk_size=3, banked=[(0, DONE)]
    )
    pending.start().next_chunks()
    assert [text.split("|")[0].strip() for text in generator.shown] == [
        "rollout:  33%",
        "rollout:  67%",
        "rollout: 100%",
    ]
    assert " 3/3 [" in generator.shown[-1] and "response/s" in generator.shown[-1]
    assert sys.stderr.getvalue().endswith("\r"), "the bar is gone"

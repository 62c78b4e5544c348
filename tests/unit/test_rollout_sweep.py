"""The running batch is read off measured rates, within a budget of seconds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.helpers.generator_requests import prompts_of

from hetero_ppo.config.schema import SamplingConfig
from hetero_ppo.rollout.generator import Capabilities, GenerationRequest, NullGenerator
from hetero_ppo.rollout.sweep import SweepResult, batches, find_running_batch
from hetero_ppo.types import OnResponse, Response


class Timed(NullGenerator):
    """One step of decoding takes 10 ms and 0.25 ms per response; from ``knee`` responses on, time grows with them."""

    is_here = True

    def __init__(self, knee: int) -> None:
        super().__init__(Capabilities())
        self.knee = knee
        self.now = 0.0
        self.asked: list[tuple[int, SamplingConfig]] = []

    def clock(self) -> float:
        return self.now

    def generate(
        self,
        request: GenerationRequest,
        *,
        on_response: OnResponse | None = None,
        on_stalled: Callable[[], None] | None = None,
    ) -> list[list[Response]]:
        batch = request.num_places
        self.asked.append((batch, request.sampling))
        step_s = 0.010 + 0.00025 * batch
        self.now += request.sampling.max_tokens * step_s * max(1.0, batch / self.knee)
        return []


def sweep(generator: Timed, budget_s: float = 100.0, max_tokens: int = 512) -> SweepResult:
    sampling = SamplingConfig(max_tokens=max_tokens, stop=["x"], stop_token_ids=[3], temperature=0.7)
    return find_running_batch(
        generator, prompts_of([[1], [2, 3]]), sampling, largest=200, budget_s=budget_s, clock=generator.clock
    )


def test_the_fewest_requests_that_are_as_fast_as_the_best() -> None:
    result = sweep(Timed(knee=64))
    assert list(result.tokens_per_s) == [8, 16, 32, 64, 128, 200]
    assert result.tokens_per_s[32] == pytest.approx(32 / 0.018) and result.tokens_per_s[64] == pytest.approx(64 / 0.026)
    assert result.batch == 64
    assert sweep(Timed(knee=10_000)).batch == 200
    assert "           64      2462         100%  <- chunk" in result.table().splitlines()


def test_responses_are_of_one_length_and_otherwise_the_run_s() -> None:
    generator = Timed(64)
    sweep(generator)
    assert {(s.max_tokens, s.ignore_eos, s.temperature, *s.stop, *s.stop_token_ids) for _, s in generator.asked} == {
        (32, True, 0.7)
    }
    sweep(short := Timed(64), max_tokens=5)
    assert {sampling.max_tokens for _, sampling in short.asked} == {5}


def test_the_budget_ends_the_sweep() -> None:
    generator = Timed(knee=64)
    result = sweep(generator, budget_s=2.0)
    assert list(result.tokens_per_s) == [8, 16] and result.batch == 16
    assert result.seconds < 2.0 + 32 * 0.014
    assert list(sweep(Timed(64), budget_s=0.001).tokens_per_s) == [8]


def test_batches() -> None:
    assert batches(64) == [8, 16, 32, 64] and batches(5) == [5] and batches(100) == [8, 16, 32, 64, 100]
    with pytest.raises(ValueError, match="sweep: largest=0"):
        find_running_batch(Timed(1), prompts_of([[1]]), SamplingConfig(), largest=0, budget_s=1.0)

"""The running batch is read off measured rates, within a budget of seconds."""

from __future__ import annotations

import pytest

from hetero_ppo.config.schema import SamplingConfig
from hetero_ppo.rollout.sweep import SweepResult, batches, find_running_batch
from hetero_ppo.types import Response


class Engine:
    """One step of decoding takes 10 ms and 0.25 ms per response; from ``knee`` responses on, time grows with them."""

    def __init__(self, knee: int) -> None:
        self.knee = knee
        self.now = 0.0
        self.asked: list[tuple[int, SamplingConfig]] = []

    def clock(self) -> float:
        return self.now

    def generate(
        self, prompts: list[list[int]], sampling: SamplingConfig, *, n: int, seed: int
    ) -> list[list[Response]]:
        batch = len(prompts) * n
        self.asked.append((batch, sampling))
        step_s = 0.010 + 0.00025 * batch
        self.now += sampling.max_tokens * step_s * max(1.0, batch / self.knee)
        return []


def sweep(engine: Engine, budget_s: float = 100.0, max_tokens: int = 512) -> SweepResult:
    sampling = SamplingConfig(max_tokens=max_tokens, stop=["x"], stop_token_ids=[3], temperature=0.7)
    return find_running_batch(engine, [[1], [2, 3]], sampling, largest=200, budget_s=budget_s, clock=engine.clock)


def test_the_fewest_requests_that_are_as_fast_as_the_best() -> None:
    result = sweep(Engine(knee=64))
    assert list(result.tokens_per_s) == [8, 16, 32, 64, 128, 200]
    assert result.tokens_per_s[32] == pytest.approx(32 / 0.018) and result.tokens_per_s[64] == pytest.approx(64 / 0.026)
    assert result.batch == 64
    assert sweep(Engine(knee=10_000)).batch == 200
    assert "           64       2462         100%   <- chunk" in result.table().splitlines()


def test_responses_are_of_one_length_and_otherwise_the_run_s() -> None:
    engine = Engine(64)
    sweep(engine)
    assert {(s.max_tokens, s.ignore_eos, s.temperature, *s.stop, *s.stop_token_ids) for _, s in engine.asked} == {
        (32, True, 0.7)
    }
    sweep(short := Engine(64), max_tokens=5)
    assert {sampling.max_tokens for _, sampling in short.asked} == {5}


def test_the_budget_ends_the_sweep() -> None:
    engine = Engine(knee=64)
    result = sweep(engine, budget_s=2.0)
    assert list(result.tokens_per_s) == [8, 16] and result.batch == 16
    assert result.seconds < 2.0 + 32 * 0.014
    assert list(sweep(Engine(64), budget_s=0.001).tokens_per_s) == [8]


def test_batches() -> None:
    assert batches(64) == [8, 16, 32, 64] and batches(5) == [5] and batches(100) == [8, 16, 32, 64, 100]
    with pytest.raises(ValueError, match="sweep: largest=0"):
        find_running_batch(Engine(1), [[1]], SamplingConfig(), largest=0, budget_s=1.0)

"""Requests of tests that have nothing but token ids."""

from __future__ import annotations

from typing import Any

from hetero_ppo.config.schema import SamplingConfig
from hetero_ppo.rollout.generator import GenerationRequest, Generator
from hetero_ppo.types import OnResponse, PromptBatch, Response


def prompts_of(ids: list[list[int]]) -> PromptBatch:
    """Return prompts of these token ids; their rows in the data are their places here."""
    count = len(ids)
    return PromptBatch(ids, [""] * count, [None] * count, list(range(count)), [None] * count, [{}] * count)


def ask(
    generator: Generator,
    ids: list[list[int]],
    sampling: SamplingConfig,
    *,
    n: int,
    seed: int,
    on_response: OnResponse | None = None,
    **more: Any,
) -> list[list[Response]]:
    """Return the generator's answers to token ids; ``more`` are further fields of the request."""
    request = GenerationRequest(prompts_of(ids), sampling, n=n, seed=seed, **more)
    return generator.generate(request, on_response=on_response)

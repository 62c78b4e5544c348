"""Finds the smallest batch at which a generator reaches its best rate, by measuring it."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from hetero_ppo.config.schema import SamplingConfig
from hetero_ppo.rollout.generator import GenerationRequest, Generator
from hetero_ppo.table import render_table
from hetero_ppo.types import PromptBatch

FIRST_BATCH = 8
NUM_TOKENS = 32  # of every response: long enough that prefills do not decide, short enough for a few rounds
NUM_ROUNDS = 3  # of each batch; the median counts


@dataclass(frozen=True)
class SweepResult:
    """Rates by batch, and the batch that was chosen."""

    tokens_per_s: dict[int, float]  # responses in flight -> response tokens per second, all servers together
    batch: int  # smallest one with ``share`` of the best rate
    share: float
    seconds: float  # that the sweep took

    def table(self) -> str:
        """Return a table for the log, with a line per batch."""
        best = max(self.tokens_per_s.values())
        rows = [("running batch", "tokens/s", "of the best", "")]
        for batch, rate in self.tokens_per_s.items():
            chosen = "<- chunk" if batch == self.batch else ""
            rows.append((str(batch), f"{rate:.0f}", f"{rate / best:.0%}", chosen))
        return render_table(rows, "rrrl")


def batches(largest: int) -> list[int]:
    """Return 8, 16, 32, ... and the largest itself."""
    sizes = []
    size = FIRST_BATCH
    while size < largest:
        sizes.append(size)
        size *= 2
    return [*sizes, largest]


def find_running_batch(
    generator: Generator,
    prompts: PromptBatch,
    sampling: SamplingConfig,
    *,
    largest: int,
    budget_s: float,
    share: float = 0.95,
    clock: Callable[[], float] = time.perf_counter,
) -> SweepResult:
    """Generate with more and more requests at once, and return the fewest that reach ``share`` of the best rate.

    Args:
        generator: Generator that is started, awake and has weights.
        prompts: Prompts of the run. They are repeated where the batch is larger.
        sampling: Sampling of the run. All responses have 32 tokens here, or ``max_tokens`` if that is less.
        largest: Number of requests that the generator runs at once: ``max_num_seqs`` of all servers.
        budget_s: Seconds after which no larger batch, and no further round of one, is started. The first batch is always measured.
        share: Share of the best rate that is good enough, in (0, 1].
        clock: Clock in seconds.

    Raises:
        ValueError: A number is out of its range.
    """
    if largest < 1 or not 0 < share <= 1 or budget_s <= 0:
        raise ValueError(
            f"sweep: largest={largest}, share={share}, budget_s={budget_s}: at least 1, in (0, 1], above 0"
        )
    num_tokens = min(NUM_TOKENS, sampling.max_tokens)
    short = dataclasses.replace(sampling, max_tokens=num_tokens, ignore_eos=True, stop_token_ids=[], stop=[])
    start = clock()
    rates: dict[int, float] = {}
    # What is compiled or allocated at the first request is not part of the rate.
    generator.generate(GenerationRequest(prompts.select([0]), short, n=1, seed=0))
    for batch in batches(largest):
        if rates and clock() - start > budget_s:
            break
        asked = prompts.select([row % len(prompts) for row in range(batch)])
        rounds: list[float] = []
        while len(rounds) < NUM_ROUNDS and (not rounds or clock() - start <= budget_s):
            begin = clock()
            generator.generate(GenerationRequest(asked, short, n=1, seed=len(rounds)))
            rounds.append(batch * num_tokens / (clock() - begin))
        rates[batch] = statistics.median(rounds)
    best = max(rates.values())
    chosen = min(batch for batch, rate in rates.items() if rate >= share * best)
    return SweepResult(rates, chosen, share, clock() - start)

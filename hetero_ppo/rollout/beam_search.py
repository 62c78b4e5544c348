"""Beam search over next-token log-probs, for evaluation.

The search itself knows no generator: :meth:`BeamSearch.advance` takes the best next tokens of every live beam. Candidates are
ranked as in Wu et al. 2016 ("Google's neural machine translation system", section 7) and as transformers ranks them: a
hypothesis of L tokens, end-of-sequence included, with summed log-prob c has the score c / L^a, where a is the length penalty. Of all
continuations the best ``num_beams`` that do not end a sequence live on; an end among the best ``num_beams`` is finished.

**When it stops.** A live beam of l tokens with sum c <= 0 can only lose: every descendant has a sum c' <= c <= 0 and a length L with
l < L <= max_tokens. For a > 0 the score c' / L^a is at most c / max_tokens^a, that of the longest descendant if it lost nothing more. For
a <= 0, L^a falls with L, and the score is at most c / (l + 1)^a, that of the shortest one. The search ends when no live beam's bound is
above the worst of the ``num_return`` best finished hypotheses. From then on nothing that is returned can change.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from hetero_ppo.rollout.servers.pool import gather_all

#: Function from response tokens to the most probable next tokens: (token id, log-prob), best first.
Expand = Callable[[list[int]], Coroutine[Any, Any, list[tuple[int, float]]]]


@dataclass(frozen=True)
class Hypothesis:
    """One answer of a beam search."""

    token_ids: list[int]  # response tokens, the end-of-sequence token included when it ends one
    log_prob: float  # of the response, summed over its tokens, nats
    score: float  # log_prob / len(token_ids) ** length_penalty
    finish_reason: str  # "stop" or "length"


@dataclass(frozen=True)
class Beam:
    """A hypothesis that has not ended."""

    token_ids: list[int]
    log_prob: float


@dataclass
class BeamSearch:
    """The state of one prompt's search.

    Args:
        num_beams: Largest number of live beams, at least 1.
        max_tokens: Largest number of response tokens. A response of so many tokens is finished with ``length``.
        length_penalty: Exponent a. Above 0 it favours longer responses, below 0 shorter ones.
        end_token_ids: Token ids that end a response.
        num_return: Number of hypotheses to return, at most ``num_beams``. The more, the later the search may end.

    Raises:
        ValueError: A number is out of its range.
    """

    num_beams: int
    max_tokens: int
    length_penalty: float
    end_token_ids: Sequence[int]
    num_return: int
    live: list[Beam] = field(default_factory=lambda: [Beam([], 0.0)])
    finished: list[Hypothesis] = field(default_factory=list)  # the best num_return, best first

    def __post_init__(self) -> None:
        if self.num_beams < 1 or self.max_tokens < 1:
            raise ValueError(
                f"beam search: num_beams={self.num_beams}, max_tokens={self.max_tokens}; both are at least 1"
            )
        if not 1 <= self.num_return <= self.num_beams:
            raise ValueError(f"beam search: num_return={self.num_return} is not in 1..num_beams ({self.num_beams})")

    @property
    def num_candidates(self) -> int:
        """Number of next tokens of one beam that can matter: at most ``num_beams`` live on, and each end token may rank above them."""
        return self.num_beams + len(self.end_token_ids)

    @property
    def done(self) -> bool:
        """True when no further token can change what is returned."""
        if not self.live:
            return True
        if len(self.finished) < self.num_return:
            return False
        # The first beam has the largest sum, and so the largest bound.
        return self.bound(self.live[0]) <= self.finished[-1].score

    def score(self, log_prob: float, length: int) -> float:
        """Return the score of a hypothesis of ``length`` tokens."""
        return log_prob / length**self.length_penalty

    def bound(self, beam: Beam) -> float:
        """Return the highest score that any descendant of a live beam can reach."""
        length = self.max_tokens if self.length_penalty > 0 else len(beam.token_ids) + 1
        return self.score(beam.log_prob, length)

    def advance(self, candidates: Sequence[Sequence[tuple[int, float]]]) -> None:
        """Extend the live beams by one token.

        Args:
            candidates: The ``num_candidates`` most probable next tokens of each live beam, in order, as (token id, log-prob). They
                are all tokens where the vocabulary has fewer.
        """
        ranked = sorted(
            (
                (beam.log_prob + log_prob, beam, token)
                for beam, tokens in zip(self.live, candidates, strict=True)
                for token, log_prob in tokens
            ),
            key=lambda candidate: -candidate[0],
        )
        self.live = []
        for rank, (log_prob, beam, token) in enumerate(ranked):
            token_ids = [*beam.token_ids, token]
            ends = token in self.end_token_ids
            if ends or len(token_ids) == self.max_tokens:
                if rank < self.num_beams:
                    score = self.score(log_prob, len(token_ids))
                    self.finished.append(Hypothesis(token_ids, log_prob, score, "stop" if ends else "length"))
            elif len(self.live) < self.num_beams:
                self.live.append(Beam(token_ids, log_prob))
        self.finished = sorted(self.finished, key=lambda hypothesis: -hypothesis.score)[: self.num_return]


async def run_search(search: BeamSearch, expand: Expand) -> list[Hypothesis]:
    """Run a search to its end and return its hypotheses, best first.

    Args:
        search: New search.
        expand: Function that gives the ``search.num_candidates`` most probable next tokens. All live beams call it concurrently.
    """
    while not search.done:
        search.advance(await gather_all([expand(beam.token_ids) for beam in search.live]))
    return search.finished

"""Beam search against enumeration of all responses, and its early stop against going on to the end."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from hetero_ppo.rollout.beam_search import Beam, BeamSearch, Hypothesis

VOCAB = 4
END = 0
MAX_TOKENS = 5
PENALTIES = [-1.5, -0.5, 0.0, 0.7, 1.0, 2.5]


@functools.cache
def next_log_probs(seed: int, sharpness: float, token_ids: tuple[int, ...]) -> list[float]:
    """Return a language model's log-probs, drawn from a seed and the tokens before."""
    number = seed
    for token in token_ids:
        number = number * VOCAB + token + 1
    logits = sharpness * torch.randn(VOCAB, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    return torch.log_softmax(logits, 0).tolist()


def search(
    seed: int, sharpness: float, num_beams: int, penalty: float, num_return: int, *, to_the_end: bool = False
) -> tuple[list[Hypothesis], int]:
    """Search. Return the hypotheses and the number of steps."""
    beams = BeamSearch(num_beams, MAX_TOKENS, penalty, [END], num_return)
    steps = 0
    while beams.live if to_the_end else not beams.done:
        tables = [list(enumerate(next_log_probs(seed, sharpness, tuple(beam.token_ids)))) for beam in beams.live]
        best = [sorted(table, key=lambda entry: -entry[1])[: beams.num_candidates] for table in tables]
        beams.advance(best)
        steps += 1
    return beams.finished, steps


def all_responses(seed: int, sharpness: float, penalty: float) -> list[tuple[float, tuple[int, ...]]]:
    """Return the (score, tokens) of every possible response, best first."""
    found = []
    for length in range(1, MAX_TOKENS + 1):
        for body in itertools.product(range(1, VOCAB), repeat=length - 1):
            for last in range(VOCAB):
                if last != END and length < MAX_TOKENS:
                    continue
                tokens = (*body, last)
                log_prob = sum(next_log_probs(seed, sharpness, tokens[:t])[token] for t, token in enumerate(tokens))
                found.append((log_prob / length**penalty, tokens))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_with_enough_beams_it_finds_the_best_responses_of_all(penalty: float) -> None:
    for seed in range(3):
        expected = all_responses(seed, 1.5, penalty)[:5]
        found, _ = search(seed, 1.5, num_beams=VOCAB**MAX_TOKENS, penalty=penalty, num_return=5)
        assert [tuple(one.token_ids) for one in found] == [tokens for _, tokens in expected]
        assert [one.score for one in found] == pytest.approx([score for score, _ in expected], abs=1e-12)
        assert all(one.finish_reason == ("stop" if one.token_ids[-1] == END else "length") for one in found)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("num_return", [1, 2])
def test_stopping_early_changes_no_result(penalty: float, num_return: int) -> None:
    saved = 0
    for seed in range(20):
        early, steps = search(seed, 3.0, 2, penalty, num_return)
        late, all_steps = search(seed, 3.0, 2, penalty, num_return, to_the_end=True)
        assert early == late
        saved += all_steps - steps
    assert saved > 0 or penalty > 2


@pytest.mark.parametrize("penalty", PENALTIES)
def test_no_descendant_is_above_the_bound(penalty: float) -> None:
    """And the bound is the least there is: one descendant that loses nothing more reaches it."""
    beams = BeamSearch(2, MAX_TOKENS, penalty, [END], num_return=1)
    beam = Beam([1, 2], -1.25)
    reached = [beams.score(beam.log_prob, length) for length in range(3, MAX_TOKENS + 1)]
    assert beams.bound(beam) == max(reached)


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="num_beams=0"):
        BeamSearch(0, 4, 1.0, [END], num_return=1)
    with pytest.raises(ValueError, match="num_return=3 is not in 1..num_beams"):
        BeamSearch(2, 4, 1.0, [END], num_return=3)

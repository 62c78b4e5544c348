"""One token from each of many distributions, with a random number for each that the caller brings."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_tokens(
    logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float, top_k: int
) -> tuple[Tensor, Tensor]:
    """Draw from softmax(logits / temperature), cut to the top k tokens and then to the top p of what is left.

    A row's draw depends on its own logits and its own random number alone (inversion of the cumulative distribution).

    Args:
        logits: [n, V], finite.
        uniforms: [n] float64 in [0, 1).
        temperature: Temperature of the distribution; 0 takes the largest logit, the first of several.
        top_p: Smallest share of the probability that is kept, in (0, 1]: nucleus sampling (Holtzman et al. 2020).
        top_k: Number of tokens that are kept, besides those that are as likely as the last of them; -1 keeps all.

    Returns:
        (tokens [n] int64, log-probs [n] float32) in the distribution that was drawn from; at temperature 0, in that of
        temperature 1 before any cut.
    """
    logits = logits.float()
    if temperature == 0:
        tokens = logits.argmax(dim=-1)
        return tokens, _log_probs(logits, tokens)
    logits = _cut(logits / temperature, top_p, top_k)
    cumulative = torch.softmax(logits, dim=-1).cumsum(dim=-1, dtype=torch.float64)
    # The product stays below the total, so the search finds a token that was kept.
    target = uniforms.clamp(max=1 - 2**-50)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return tokens, _log_probs(logits, tokens)


def _log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1).gather(1, tokens[:, None])[:, 0]


def _cut(logits: Tensor, top_p: float, top_k: int) -> Tensor:
    """Return [n, V] logits with -inf for the tokens that are left out."""
    if 0 < top_k < logits.shape[-1]:
        last = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < last, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probs = torch.softmax(ordered, dim=-1)
        before = probs.cumsum(dim=-1) - probs  # of all tokens that are likelier; 0 for the first, which is always kept
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter_(1, order, ordered)
    return logits

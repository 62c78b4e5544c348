"""Where a sequence ends: the one place that says so for reward-model training, evaluation and PPO.

A sequence carries its length from the tokeniser or the engine on; nothing looks for an end-of-sequence token in padded
ids, because pad and end-of-sequence may be the same token and text may hold the token in the middle. SFT and preference
examples end with the end-of-sequence token; a response that was cut off at its token limit does not, and is scored at
its last token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def last_token_index(sequence_lengths: Tensor) -> Tensor:
    """[B] int64 column of the last real token of right-padded sequences of ``sequence_lengths`` [B] tokens."""
    return sequence_lengths - 1


def at_sequence_end(values: Tensor, sequence_lengths: Tensor) -> Tensor:
    """[B] the entries of ``values`` [B, S], one column per token, at each sequence's last real token."""
    return torch.gather(values, 1, last_token_index(sequence_lengths).unsqueeze(1)).squeeze(1)

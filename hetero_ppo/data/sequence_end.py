"""The end of a sequence, defined in one place for reward-model training, evaluation and PPO.

The tokenizer or the generator gives a sequence its length, and the sequence keeps it. Nothing searches padded ids for an end-of-sequence
token: pad and end-of-sequence may be the same token, and text may contain it in the middle. SFT and preference examples end with the
end-of-sequence token. A response that was cut off at its token limit does not, and is scored at its last token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def last_token_index(sequence_lengths: Tensor) -> Tensor:
    """Return [B] int64: the column of the last real token of right-padded sequences of ``sequence_lengths`` [B] tokens."""
    return sequence_lengths - 1


def at_sequence_end(values: Tensor, sequence_lengths: Tensor) -> Tensor:
    """Return [B]: the entries of ``values`` [B, S], one column per token, at each sequence's last real token."""
    return torch.gather(values, 1, last_token_index(sequence_lengths).unsqueeze(1)).squeeze(1)

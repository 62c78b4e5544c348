"""Masks over predicted tokens, and sums, means and whitening under them.

Letters: B sequences, S tokens of the padded sequence, T = S - 1 columns. Column t belongs to the prediction of token
t + 1 from tokens 0..t (see ``hetero_ppo.types``).
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Added to the variance when whitening: a batch of equal advantages becomes zeros, not a division by zero.
WHITEN_EPS = 1e-8


def response_mask(prompt_lengths: Tensor, sequence_lengths: Tensor, num_columns: int) -> Tensor:
    """Return a mask that is True where a column predicts a response token.

    The response of a row is tokens ``prompt_length .. sequence_length - 1``; the columns that predict them are
    ``prompt_length - 1 .. sequence_length - 2``.

    Args:
        prompt_lengths: [B] int64, tokens, at least 1 (the first response token needs a token before it).
        sequence_lengths: [B] int64, tokens of prompt and response.
        num_columns: Number of columns T.

    Returns:
        [B, T] bool.
    """
    column = torch.arange(num_columns, device=prompt_lengths.device)
    return (column >= prompt_lengths[:, None] - 1) & (column < sequence_lengths[:, None] - 1)


def last_response_column(response_mask: Tensor) -> Tensor:
    """Return the index of each row's last True column; -1 for a row without any.

    Args:
        response_mask: [B, T] bool.

    Returns:
        [B] int64.
    """
    column = torch.arange(response_mask.shape[1], device=response_mask.device)
    return torch.where(response_mask, column, -1).amax(dim=1)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Return the sum over the True places of ``mask``. Values elsewhere are ignored, NaN included.

    Args:
        values: Tensor of any shape.
        mask: Bool tensor of the shape of ``values``.

    Returns:
        [] in the dtype of ``values``.
    """
    return values.masked_fill(~mask, 0).sum()


def masked_mean(values: Tensor, mask: Tensor, denominator: float | None = None) -> Tensor:
    """Return ``masked_sum`` divided by ``denominator``, or by the number of True places if it is None.

    A mean over no place at all, with ``denominator=None``, is NaN, as ``torch.mean`` of an empty tensor is.

    Args:
        values: Tensor of any shape.
        mask: Bool tensor of the shape of ``values``.
        denominator: Number of tokens that the mean is over, if ``mask`` covers only a part of them.

    Returns:
        [] in the dtype of ``values``.
    """
    return masked_sum(values, mask) / (mask.sum() if denominator is None else denominator)


def whiten(values: Tensor, mask: Tensor, mean: float, var: float) -> Tensor:
    """Return ``(values - mean) / sqrt(var + 1e-8)`` in the mask and 0 outside.

    Args:
        values: [B, T] float.
        mask: [B, T] bool.
        mean: Mean of the masked values over the whole rollout batch and all ranks
            (``hetero_ppo.distributed.statistics.global_masked_moments``), not of this tensor.
        var: Population variance of the same values.

    Returns:
        [B, T] in the dtype of ``values``.
    """
    scale = (var + WHITEN_EPS) ** -0.5
    return ((values - mean) * scale).masked_fill(~mask, 0)

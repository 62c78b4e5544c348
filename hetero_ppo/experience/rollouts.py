"""Responses of a generator as one Rollout."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hetero_ppo.algorithms.masking import response_mask
from hetero_ppo.types import PromptBatch, Rollout


def build_rollout(
    prompts: PromptBatch, lengths: Tensor, tokens: Tensor, log_probs: Tensor, truncated: Tensor, version: str
) -> Rollout:
    """Join prompts and responses into right-padded sequences.

    Args:
        prompts: N prompts, one for each response.
        lengths: [N] int64, numbers of response tokens.
        tokens: [N, R] int64, right-padded responses.
        log_probs: [N, R] float32, log-probs of the tokens by the generator.
        truncated: [N] bool, whether a response reached the length limit.
        version: Label of the weights that sampled the responses.

    Raises:
        ValueError: A response is empty.
    """
    empty = (lengths == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"rollout: response {empty[0]} has no token; the generator must return the end-of-sequence token"
        )
    prompt_lengths = torch.tensor([len(ids) for ids in prompts.prompt_ids])
    sequence_lengths = prompt_lengths + lengths
    width = int(sequence_lengths.max())
    token_ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    rollout_log_probs = torch.zeros(len(lengths), width - 1, dtype=torch.float32)
    for row in range(len(lengths)):
        start, end, length = int(prompt_lengths[row]), int(sequence_lengths[row]), int(lengths[row])
        token_ids[row, :start] = torch.tensor(prompts.prompt_ids[row])
        token_ids[row, start:end] = tokens[row, :length]
        rollout_log_probs[row, start - 1 : end - 1] = log_probs[row, :length]
    return Rollout(
        token_ids=token_ids,
        prompt_lengths=prompt_lengths,
        sequence_lengths=sequence_lengths,
        response_mask=response_mask(prompt_lengths, sequence_lengths, width - 1),
        rollout_log_probs=rollout_log_probs,
        truncated=truncated,
        weight_version=[version] * len(lengths),
        prompt_texts=prompts.prompt_texts,
        prompt_index=prompts.prompt_index,
        labels=prompts.labels,
        metadata=prompts.metadata,
        prompt_messages=prompts.prompt_messages,
    )


def response_texts(rollout: Rollout, decode: Decode) -> list[str]:
    """Return the responses as texts, without special tokens."""
    return [
        decode(rollout.token_ids[row, int(rollout.prompt_lengths[row]) : int(rollout.sequence_lengths[row])].tolist())
        for row in range(rollout.batch_size)
    ]


class Decode(Protocol):
    """Turns token ids into text."""

    def __call__(self, token_ids: list[int]) -> str: ...

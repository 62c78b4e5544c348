"""Collate lists of examples into padded batches. Padding is on the right and has id 0, which nothing reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hetero_ppo.data.preference import PreferenceExample
from hetero_ppo.data.prompts import PromptExample
from hetero_ppo.data.sft import SftExample
from hetero_ppo.types import PreferenceBatch, PromptBatch, SupervisedBatch


def pad_right(sequences: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Pad sequences on the right to the longest, S: return [B, S] int64 ids and [B] int64 lengths."""
    lengths = torch.tensor([len(ids) for ids in sequences], dtype=torch.int64)
    padded = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.int64)
    for row, ids in enumerate(sequences):
        padded[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return padded, lengths


def collate_sft(examples: Sequence[SftExample]) -> SupervisedBatch:
    """Collate at least one example. Column t of the mask belongs to the prediction of token t + 1."""
    token_ids, lengths = pad_right([example.token_ids for example in examples])
    mask = torch.zeros(token_ids.shape[0], token_ids.shape[1] - 1, dtype=torch.bool)
    for row, example in enumerate(examples):
        for start, end in example.answer_spans:
            mask[row, max(start - 1, 0) : end - 1] = True
    return SupervisedBatch(token_ids=token_ids, sequence_lengths=lengths, loss_mask=mask)


def collate_preferences(examples: Sequence[PreferenceExample]) -> PreferenceBatch:
    """Collate at least one pair. Chosen and rejected sequences are padded separately, each side to its own longest."""
    chosen_ids, chosen_lengths = pad_right([example.chosen_ids for example in examples])
    rejected_ids, rejected_lengths = pad_right([example.rejected_ids for example in examples])
    return PreferenceBatch(
        chosen_ids=chosen_ids,
        chosen_lengths=chosen_lengths,
        rejected_ids=rejected_ids,
        rejected_lengths=rejected_lengths,
    )


def collate_prompts(examples: Sequence[PromptExample]) -> PromptBatch:
    """Collate prompts. They stay lists, because the generator needs no padding."""
    examples = list(examples)  # every access to a stored example reads from its file
    return PromptBatch(
        prompt_ids=[example.prompt_ids for example in examples],
        prompt_texts=[example.text for example in examples],
        prompt_messages=[example.messages for example in examples],
        prompt_index=[example.index for example in examples],
        labels=[example.label for example in examples],
        metadata=[example.metadata for example in examples],
    )

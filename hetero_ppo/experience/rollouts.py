"""Engine answers as one Rollout on every rank."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hetero_ppo.algorithms.masking import response_mask
from hetero_ppo.config.schema import SamplingConfig
from hetero_ppo.errors import RunError
from hetero_ppo.types import OnResponse, PromptBatch, Response, Rollout


class Generator(Protocol):
    """What a rollout engine offers here."""

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        *,
        n: int,
        seed: int,
        max_tokens: list[int] | None = None,
        on_response: OnResponse | None = None,
    ) -> list[list[Response]]: ...


def collect_rollout(
    engine: Generator | None, prompts: PromptBatch, sampling: SamplingConfig, *, n: int, seed: int, version: str
) -> Rollout:
    """Answer the prompts and hand the answers to every rank. Collective over the world.

    Args:
        engine: on rank 0; None on the others.
        prompts: the same on every rank.
        sampling: how to sample.
        n: responses per prompt; they lie next to each other in the result.
        seed: of this call.
        version: label of the weights that the engine holds.

    Raises:
        RuntimeError: an answer was made by other weights than ``version``.
    """
    responses: list[Response] = []
    if engine is not None:
        answers = engine.generate(prompts.prompt_ids, sampling, n=n, seed=seed)
        responses = [response for answer in answers for response in answer]
        stale = sorted({r.weight_version for r in responses} - {version})
        if stale:
            raise RunError(f"rollout: answers made by weights {stale}, the actor is at {version!r}: sync was lost")
    lengths, tokens, log_probs, truncated = _share(responses, len(prompts) * n, sampling)
    return build_rollout(prompts, n, lengths, tokens, log_probs, truncated, version)


def _share(
    responses: list[Response], num_responses: int, sampling: SamplingConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lengths [N], tokens [N, R], log-probs [N, R], truncated [N] from rank 0 to all ranks."""
    header = torch.zeros(num_responses, 2, dtype=torch.int64)
    tokens = torch.zeros(num_responses, sampling.max_tokens, dtype=torch.int64)
    log_probs = torch.zeros(num_responses, sampling.max_tokens, dtype=torch.float32)
    for row, response in enumerate(responses):
        length = len(response.token_ids)
        header[row, 0] = length
        header[row, 1] = response.finish_reason == "length" and not sampling.ignore_eos
        tokens[row, :length] = torch.tensor(response.token_ids)
        log_probs[row, :length] = torch.tensor(response.log_probs)
    if dist.get_world_size() > 1:
        for tensor in (header, tokens, log_probs):
            dist.broadcast(tensor, 0)
    return header[:, 0], tokens, log_probs, header[:, 1].bool()


def build_rollout(
    prompts: PromptBatch, n: int, lengths: Tensor, tokens: Tensor, log_probs: Tensor, truncated: Tensor, version: str
) -> Rollout:
    """Join prompts and responses into right-padded sequences.

    Args:
        prompts: P prompts.
        n: responses per prompt, N = P * n.
        lengths: [N] int64, response tokens.
        tokens: [N, R] int64, right-padded responses.
        log_probs: [N, R] float32.
        truncated: [N] bool.
        version: label of the weights.

    Raises:
        ValueError: an empty response.
    """
    empty = (lengths == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"rollout: response {empty[0]} has no token; the engine must return the end-of-sequence token")
    prompt_lengths = torch.tensor([len(ids) for ids in prompts.prompt_ids]).repeat_interleave(n)
    sequence_lengths = prompt_lengths + lengths
    width = int(sequence_lengths.max())
    token_ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    rollout_log_probs = torch.zeros(len(lengths), width - 1, dtype=torch.float32)
    for row in range(len(lengths)):
        start, end, length = int(prompt_lengths[row]), int(sequence_lengths[row]), int(lengths[row])
        token_ids[row, :start] = torch.tensor(prompts.prompt_ids[row // n])
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
        prompt_texts=[text for text in prompts.prompt_texts for _ in range(n)],
        prompt_index=[index for index in prompts.prompt_index for _ in range(n)],
        labels=[label for label in prompts.labels for _ in range(n)],
        metadata=[metadata for metadata in prompts.metadata for _ in range(n)],
    )


def response_texts(rollout: Rollout, decode: Decode) -> list[str]:
    """The responses as text, special tokens left out."""
    return [
        decode(rollout.token_ids[row, int(rollout.prompt_lengths[row]) : int(rollout.sequence_lengths[row])].tolist())
        for row in range(rollout.batch_size)
    ]


class Decode(Protocol):
    """Token ids to text."""

    def __call__(self, token_ids: list[int]) -> str: ...

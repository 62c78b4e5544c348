"""Turns a model's output on the last pipeline stage into what the algorithm reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hetero_ppo.data.sequence_end import at_sequence_end
from hetero_ppo.distributed.vocab_parallel import vocab_parallel_log_probs
from hetero_ppo.engines.model_input import in_place, next_tokens
from hetero_ppo.types import Microbatch

#: (model output, micro-batch) -> [b, s - 1] float32, or [b] float32. The output is [1, n, V / tp] logits of the n tokens that the
#: output mask selects on this context-parallel rank, or the [b, s] float32 of a scalar head, whole on every rank and 0 outside the
#: output mask. The micro-batch is that of a ``ModelInput``.
OutputFn = Callable[[Tensor, Microbatch], Tensor]


def token_log_probs(
    logits: Tensor,
    microbatch: Microbatch,
    *,
    temperature: float,
    vocab_size: int,
    groups: ProcessGroupCollection,
    with_entropy: bool = False,
    num_parts: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the log-probs of the next tokens, and optionally the entropy of their distributions.

    Args:
        logits: [1, n, V / tp], logits of the tokens in the output mask for this rank's slice of the vocabulary.
        microbatch: Micro-batch of a ``ModelInput``.
        temperature: Divisor of the logits, as in the generator's sampler.
        vocab_size: Size of the vocabulary without padding columns, which are ignored.
        groups: Process groups of the role. The results are whole on every context-parallel rank.
        num_parts: Number of parts of the vocabulary that an aligned role sums over, as in ``vocab_parallel_log_probs``; None otherwise.

    Returns:
        ([b, s - 1] float32, [b, s - 1] float32 or None); 0 outside the output mask.
    """
    targets = next_tokens(microbatch, groups.cp)
    log_probs, entropy = vocab_parallel_log_probs(
        logits[0],
        targets,
        temperature=temperature,
        vocab_size=vocab_size,
        tp_group=groups.tp,
        with_entropy=with_entropy,
        num_parts=num_parts,
    )
    own = log_probs[None] if entropy is None else torch.stack([log_probs, entropy])
    whole = in_place(own, microbatch, groups.cp)[:, :, :-1]
    return whole[0], None if entropy is None else whole[1]


def log_probs_output(
    *, temperature: float, vocab_size: int, groups: ProcessGroupCollection, num_parts: int | None = None
) -> OutputFn:
    """Return a function from [1, n, V / tp] logits to [b, s - 1] log-probs. The arguments are those of ``token_log_probs``."""

    def output(logits: Tensor, microbatch: Microbatch) -> Tensor:
        return token_log_probs(
            logits, microbatch, temperature=temperature, vocab_size=vocab_size, groups=groups, num_parts=num_parts
        )[0]

    return output


def values_output(values: Tensor, microbatch: Microbatch) -> Tensor:
    """Return [b, s - 1] of [b, s] values: column t is the value of the state in which token t + 1 is chosen."""
    return values[:, :-1]


def scores_output(scores: Tensor, microbatch: Microbatch) -> Tensor:
    """Return [b] of [b, s] scores: the score at the end of each sequence."""
    return at_sequence_end(scores, microbatch.sequence_lengths)

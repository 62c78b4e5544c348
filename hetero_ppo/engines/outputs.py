"""From a model's output on the last pipeline stage to what the algorithm reads."""

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
    """Log-probs of the tokens that came, and optionally the entropy of the distributions they came from.

    Args:
        logits: [1, n, V / tp], of the tokens in the output mask and this rank's slice of the vocabulary.
        microbatch: Of a ``ModelInput``.
        temperature: Divides the logits, as the engine's sampler does.
        vocab_size: True size; the padding columns above it take no part.
        groups: The role's; the results are whole on every context-parallel rank.
        num_parts: Of the vocabulary, see ``vocab_parallel_log_probs``; those of an aligned role.

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
    """[1, n, V / tp] -> [b, s - 1] log-probs; arguments as for ``token_log_probs``."""

    def output(logits: Tensor, microbatch: Microbatch) -> Tensor:
        return token_log_probs(
            logits, microbatch, temperature=temperature, vocab_size=vocab_size, groups=groups, num_parts=num_parts
        )[0]

    return output


def values_output(values: Tensor, microbatch: Microbatch) -> Tensor:
    """[b, s] -> [b, s - 1]: column t is the value of the state that token t + 1 is chosen in."""
    return values[:, :-1]


def scores_output(scores: Tensor, microbatch: Microbatch) -> Tensor:
    """[b, s] -> [b]: the score at the end of each sequence."""
    return at_sequence_end(scores, microbatch.sequence_lengths)

"""From a model's output on the last pipeline stage to what the algorithm reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hetero_ppo.data.sequence_end import at_sequence_end
from hetero_ppo.distributed.vocab_parallel import vocab_parallel_log_probs
from hetero_ppo.types import Microbatch
from megatron_bridge.context_parallel import own_columns, whole_columns

#: (model output, micro-batch) -> [b, s - 1] float32, or [b] float32. The output is [b, s / cp, V / tp] logits, or the [b, s, 1] of
#: a scalar head, whole on every context-parallel rank.
OutputFn = Callable[[Tensor, Microbatch], Tensor]


def token_log_probs(
    logits: Tensor,
    microbatch: Microbatch,
    *,
    temperature: float,
    vocab_size: int,
    groups: ProcessGroupCollection,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the tokens that came, and optionally the entropy of the distributions they came from.

    Args:
        logits: [b, s / cp, V / tp], this rank's columns and its slice of the vocabulary.
        temperature: divides the logits, as the engine's sampler does.
        vocab_size: true size; the padding columns above it take no part.
        groups: the role's; the results are whole on every context-parallel rank.

    Returns:
        ([b, s - 1] float32, [b, s - 1] float32 or None).
    """
    # The last column has no next token; it is computed with any target and cut, since cutting the logits would copy them. The
    # next token of a chunk's last column lies in another rank's chunk, so targets are made of whole rows.
    targets = own_columns(microbatch.token_ids.roll(-1, dims=1), 1, groups.cp)
    log_probs, entropy = vocab_parallel_log_probs(
        logits, targets, temperature=temperature, vocab_size=vocab_size, tp_group=groups.tp, with_entropy=with_entropy
    )
    own = log_probs[None] if entropy is None else torch.stack([log_probs, entropy])
    whole = whole_columns(own, 2, groups.cp, sum_gradients=False)[:, :, :-1]
    return whole[0], None if entropy is None else whole[1]


def log_probs_output(*, temperature: float, vocab_size: int, groups: ProcessGroupCollection) -> OutputFn:
    """[b, s / cp, V / tp] -> [b, s - 1] log-probs."""

    def output(logits: Tensor, microbatch: Microbatch) -> Tensor:
        return token_log_probs(logits, microbatch, temperature=temperature, vocab_size=vocab_size, groups=groups)[0]

    return output


def values_output(values: Tensor, microbatch: Microbatch) -> Tensor:
    """[b, s, 1] -> [b, s - 1]: column t is the value of the state that token t + 1 is chosen in."""
    return values[:, :-1, 0].float()


def scores_output(scores: Tensor, microbatch: Microbatch) -> Tensor:
    """[b, s, 1] -> [b]: the score at the end of each sequence."""
    return at_sequence_end(scores[:, :, 0].float(), microbatch.sequence_lengths)

"""From a model's output on the last pipeline stage to what the algorithm reads."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from hetero_ppo.data.sequence_end import at_sequence_end
from hetero_ppo.distributed.vocab_parallel import vocab_parallel_log_probs
from hetero_ppo.types import Microbatch

#: (model output [b, s, ...], micro-batch) -> [b, s - 1] float32, or [b] float32.
OutputFn = Callable[[Tensor, Microbatch], Tensor]


def token_log_probs(
    logits: Tensor,
    microbatch: Microbatch,
    *,
    temperature: float,
    vocab_size: int,
    tp_group: dist.ProcessGroup,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the tokens that came, and optionally the entropy of the distributions they came from.

    Args:
        logits: [b, s, V / tp], this rank's slice of the vocabulary.
        temperature: divides the logits, as the engine's sampler does.
        vocab_size: true size; the padding columns above it take no part.

    Returns:
        ([b, s - 1] float32, [b, s - 1] float32 or None).
    """
    # The last column has no next token; it is computed with any target and cut, since cutting the logits would copy them.
    targets = microbatch.token_ids.roll(-1, dims=1)
    log_probs, entropy = vocab_parallel_log_probs(
        logits, targets, temperature=temperature, vocab_size=vocab_size, tp_group=tp_group, with_entropy=with_entropy
    )
    return log_probs[:, :-1], None if entropy is None else entropy[:, :-1]


def log_probs_output(*, temperature: float, vocab_size: int, tp_group: dist.ProcessGroup) -> OutputFn:
    """[b, s, V / tp] -> [b, s - 1] log-probs."""

    def output(logits: Tensor, microbatch: Microbatch) -> Tensor:
        return token_log_probs(logits, microbatch, temperature=temperature, vocab_size=vocab_size, tp_group=tp_group)[0]

    return output


def values_output(values: Tensor, microbatch: Microbatch) -> Tensor:
    """[b, s, 1] -> [b, s - 1]: column t is the value of the state that token t + 1 is chosen in."""
    return values[:, :-1, 0].float()


def scores_output(scores: Tensor, microbatch: Microbatch) -> Tensor:
    """[b, s, 1] -> [b]: the score at the end of each sequence."""
    return at_sequence_end(scores[:, :, 0].float(), microbatch.sequence_lengths)

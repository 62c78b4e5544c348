"""What every rollout engine checks alike: prompts before they are sent, and log-probs of the golden prompt after a sync."""

from __future__ import annotations

import torch

from hetero_ppo.config.schema import Dtype, RolloutConfig, SamplingConfig
from hetero_ppo.errors import RunError

#: max |difference| between the engine's and the trainer's log-probs of a golden prompt. bf16 has 8 bits of mantissa, and the two
#: sides round at different places.
SYNC_TOLERANCE = {Dtype.fp32: 1e-3, Dtype.bf16: 0.15}


def response_limits(
    prompts: list[list[int]], sampling: SamplingConfig, max_tokens: list[int] | None, max_model_len: int
) -> list[int]:
    """Response tokens of each prompt: ``max_tokens``, or ``sampling.max_tokens`` for all. Raises as :func:`check_prompts` does."""
    limits = [sampling.max_tokens] * len(prompts) if max_tokens is None else max_tokens
    check_prompts(prompts, limits, max_model_len)
    return limits


def check_prompts(prompts: list[list[int]], max_tokens: list[int], max_model_len: int) -> None:
    """Raises ValueError for a prompt that is empty, or too long for its response to fit.

    Args:
        prompts: token ids.
        max_tokens: of each prompt's responses.
        max_model_len: tokens that the engine takes, prompt and response together.
    """
    if not prompts:
        raise ValueError("generate: no prompts")
    if len(max_tokens) != len(prompts):
        raise ValueError(f"generate: max_tokens has {len(max_tokens)} values for {len(prompts)} prompts")
    for row, (prompt, limit) in enumerate(zip(prompts, max_tokens, strict=True)):
        if not prompt:
            raise ValueError(f"generate: prompt {row} has no tokens")
        if limit < 1:
            raise ValueError(f"generate: prompt {row} may have {limit} response tokens; at least one is needed")
        if len(prompt) + limit > max_model_len:
            raise ValueError(
                f"generate: prompt {row} has {len(prompt)} tokens; with sampling.max_tokens={limit} that is more than "
                f"the engine's {max_model_len} tokens (max_model_len)"
            )


def golden_difference(
    found: list[float], expected: list[float], config: RolloutConfig, dtype: Dtype, what: str, meaning: str
) -> float:
    """The largest absolute difference between an engine's log-probs of the golden prompt and the trainer's.

    Args:
        found: by the engine, L - 1 values for a prompt of L tokens.
        expected: by the trainer, as many.
        config: the ``rollout`` section, for its tolerance.
        dtype: of the engine, for the default tolerance.
        what: the weights and the engine, for an error.
        meaning: what a difference says.

    Raises:
        RuntimeError: it exceeds the tolerance, or is no number.
    """
    tolerance = config.verify_sync_tolerance
    if tolerance is None:
        tolerance = SYNC_TOLERANCE[dtype]
    if len(found) != len(expected):
        raise RunError(f"{what} gives {len(found)} log-probs of the golden prompt, the trainer {len(expected)}")
    differences = (torch.tensor(found, dtype=torch.float64) - torch.tensor(expected, dtype=torch.float64)).abs()
    differences = differences.nan_to_num(nan=torch.inf)
    difference, position = float(differences.max()), int(differences.argmax())
    if difference > tolerance:
        raise RunError(
            f"{what} gives token {position + 1} of the golden prompt a log-prob of {found[position]:.5f}, the trainer "
            f"{expected[position]:.5f}; the difference exceeds rollout.verify_sync_tolerance ({tolerance}): {meaning}"
        )
    return difference

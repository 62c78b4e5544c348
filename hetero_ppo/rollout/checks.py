"""Checks that all generators make: of a request before it is sent, and of the probe prompt's log-probs after a sync."""

from __future__ import annotations

import torch

from hetero_ppo.config.schema import Dtype, RolloutConfig
from hetero_ppo.errors import RunError
from hetero_ppo.rollout.generator import Capabilities, GenerationRequest
from hetero_ppo.rollout.partial import ABORTED

#: Largest |difference| between the generator's and the trainer's log-probs of a probe prompt. bf16 has 8 bits of mantissa, and
#: generator and trainer round at different places.
SYNC_TOLERANCE = {Dtype.fp32: 1e-3, Dtype.bf16: 0.15}


def check_request(request: GenerationRequest, capabilities: Capabilities, max_model_len: int) -> None:
    """Raise ValueError for a request that a generator cannot answer.

    Args:
        request: The request.
        capabilities: Capabilities of the generator.
        max_model_len: Largest number of tokens of the generator, prompt and response together.
    """
    num_prompts, n = len(request.prompts), request.n
    limits = [request.sampling.max_tokens] * num_prompts if request.max_tokens is None else request.max_tokens
    check_prompts(request.prompts.prompt_ids, limits, max_model_len)
    check_resumption(request, capabilities)
    if request.num_needed is not None and not 1 <= request.num_needed <= request.num_places:
        raise ValueError(
            f"generate: num_needed={request.num_needed} is not in 1..{request.num_places}, the responses that are asked for"
        )
    if request.partial is None:
        return
    if len(request.partial) != request.num_places:
        raise ValueError(
            f"generate: partial has {len(request.partial)} responses for {num_prompts} prompts with {n} each"
        )
    for place, response in enumerate(request.partial):
        limit = request.limit_of(place // n)
        if response is not None and response.finish_reason == ABORTED and len(response.token_ids) >= limit:
            raise ValueError(
                f"generate: partial response {place} has {len(response.token_ids)} tokens, and may have {limit}"
            )


def check_resumption(request: GenerationRequest, capabilities: Capabilities) -> None:
    """Raise ValueError for a request with partial responses, or with more than it needs, to a generator that cannot resume."""
    if not capabilities.can_resume and (request.partial is not None or request.num_needed is not None):
        raise ValueError("generate: this generator resumes and aborts no responses; leave partial and num_needed out")


def check_prompts(prompts: list[list[int]], max_tokens: list[int], max_model_len: int) -> None:
    """Raise ValueError for a prompt that is empty, or too long for its response to fit.

    Args:
        prompts: Token ids.
        max_tokens: Largest number of response tokens of each prompt.
        max_model_len: Largest number of tokens of the generator, prompt and response together.
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
                f"the generator's {max_model_len} tokens (max_model_len)"
            )


def probe_difference(
    found: list[float], expected: list[float], config: RolloutConfig, dtype: Dtype, what: str, meaning: str
) -> float:
    """Return the largest absolute difference between a generator's log-probs of the probe prompt and the trainer's.

    Args:
        found: [L - 1] log-probs by the generator, for a prompt of L tokens.
        expected: [L - 1] log-probs by the trainer.
        config: The ``rollout`` section, for its tolerance.
        dtype: Dtype of the generator, for the default tolerance.
        what: Name of the weights and of the generator, for an error.
        meaning: Meaning of a difference, for an error.

    Raises:
        RuntimeError: The difference exceeds the tolerance, or is no number.
    """
    tolerance = config.verify_sync_tolerance
    if tolerance is None:
        tolerance = SYNC_TOLERANCE[dtype]
    if len(found) != len(expected):
        raise RunError(f"{what} gives {len(found)} log-probs of the probe prompt, the trainer {len(expected)}")
    differences = (torch.tensor(found, dtype=torch.float64) - torch.tensor(expected, dtype=torch.float64)).abs()
    differences = differences.nan_to_num(nan=torch.inf)
    difference, position = float(differences.max()), int(differences.argmax())
    if difference > tolerance:
        raise RunError(
            f"{what} gives token {position + 1} of the probe prompt a log-prob of {found[position]:.5f}, the trainer "
            f"{expected[position]:.5f}; the difference exceeds rollout.verify_sync_tolerance ({tolerance}): {meaning}"
        )
    return difference

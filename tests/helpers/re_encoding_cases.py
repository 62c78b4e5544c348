"""Rollouts from texts, and a chat template that is no ChatML, for the tests of reward models with another tokenizer."""

from __future__ import annotations

import torch

from hetero_ppo.data.chat_template import TextEncoder
from hetero_ppo.data.collate import pad_right
from hetero_ppo.types import Messages, Rollout

PLAIN_PROMPT = "Sort pear apple: "
#: No special token before the answer, so that a tokenizer may merge over its border; text after the end of the conversation.
SCORER_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "[{{ message['role'] }}] {{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def rollout_of(actor: TextEncoder, rows: list[tuple[Messages | None, str, bool]]) -> Rollout:
    """Make a rollout of (prompt, response, is finished) rows in the actor's ids. A finished response ends with its end-of-sequence token.

    A prompt of None is the text ``PLAIN_PROMPT``.
    """
    texts = [PLAIN_PROMPT if messages is None else messages[-1]["content"] for messages, _, _ in rows]
    prompts, answers = actor.encode(texts), actor.encode([response for _, response, _ in rows])
    ends = [[actor.eos_token_id] * finished for *_, finished in rows]
    token_ids, lengths = pad_right([a + b + c for a, b, c in zip(prompts, answers, ends, strict=True)])
    shape = (len(rows), token_ids.shape[1] - 1)
    return Rollout(
        token_ids=token_ids,
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]),
        sequence_lengths=lengths,
        response_mask=torch.zeros(shape, dtype=torch.bool),
        rollout_log_probs=torch.zeros(shape),
        truncated=torch.tensor([not finished for *_, finished in rows]),
        weight_version=["step0"] * len(rows),
        prompt_texts=texts,
        prompt_messages=[messages for messages, _, _ in rows],
        prompt_index=list(range(len(rows))),
        labels=[None] * len(rows),
    )

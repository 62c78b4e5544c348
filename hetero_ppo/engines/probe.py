"""The trainer's log-probs of the probe prompt, which a generator's are compared with after a weight sync."""

from __future__ import annotations

import torch

from hetero_ppo.engines.model_engine import ModelEngine
from hetero_ppo.engines.outputs import log_probs_output


def probe_log_probs(actor: ModelEngine, token_ids: list[int]) -> list[float]:
    """Return [L - 1] log p(token t + 1 | tokens 0..t) at temperature 1 for L tokens. Collective over the actor's ranks.

    Args:
        actor: Policy, in its turn.
        token_ids: Probe prompt of L tokens.
    """
    output = log_probs_output(
        temperature=1.0, vocab_size=actor.vocab_size, groups=actor.groups, num_parts=actor.vocab_parts
    )
    return actor.forward(torch.tensor([token_ids]), torch.tensor([len(token_ids)]), output)[0].tolist()

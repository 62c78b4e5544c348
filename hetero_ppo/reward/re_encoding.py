"""Encode responses again for a reward model with another tokenizer or template: decode with the actor's, encode with its own, once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hetero_ppo.config.schema import DataConfig, RewardRoleConfig
from hetero_ppo.data.chat_template import TextEncoder, load_reward_encoder
from hetero_ppo.data.collate import pad_right
from hetero_ppo.data.conversation import encode_responses
from hetero_ppo.data.dataset import Dataset
from hetero_ppo.data.prompts import PromptExample
from hetero_ppo.errors import RunError
from hetero_ppo.types import Messages, Rollout


class ReEncoder:
    """Token ids of responses as one reward model reads them.

    The prompt is rendered from its messages by the reward model's own template, or is its text if the run has no template. The response is its
    text without the actor's special tokens. Texts that the reward model's tokenizer would read as its own special tokens are removed;
    otherwise a response could end itself anywhere. A response that ended by itself ends with the reward model's end-of-sequence token. One that
    was cut at its token limit has none, and is scored at its last token. A sequence over ``max_tokens`` is cut there, and scored at the last
    token that is left. Every rank computes the same.
    """

    def __init__(self, role: str, encoder: TextEncoder, actor: TextEncoder, max_tokens: int) -> None:
        """Take the tokenizers of one reward model.

        Args:
            role: Name of the reward model, for messages.
            encoder: Tokenizer and template of the reward model.
            actor: Tokenizer and template of the actor.
            max_tokens: Most tokens of a sequence.
        """
        self.role = role
        self.encoder = encoder
        self.actor = actor
        self.max_tokens = max_tokens
        self._special = special_texts(encoder.tokenizer)
        self._lengths: list[int] = []  # lengths before the cut of all sequences since the last ``collect``

    def describe(self) -> str:
        """Return a line that names the two tokenizers."""
        return (
            f"{self.role}: prompts and responses are decoded with {self.actor.describe()} and encoded again with "
            f"{self.encoder.describe()}, {self.max_tokens} tokens at most"
        )

    def encode(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Return [B, S] int64 ids, right-padded, and [B] int64 lengths, as many rows as the rollout has.

        Raises:
            RunError: The template refuses a prompt's messages.
        """
        items = [self._item(rollout, row) for row in range(rollout.batch_size)]
        try:
            sequences = encode_responses(self.encoder, items)
        except ValueError as error:
            raise RunError(f"{self.role}.re_encode: {error}") from error
        self._lengths += [len(ids) for ids in sequences]
        return pad_right([ids[: self.max_tokens] for ids in sequences])

    def _item(self, rollout: Rollout, row: int) -> tuple[Messages | None, str, str, bool]:
        start, end = int(rollout.prompt_lengths[row]), int(rollout.sequence_lengths[row])
        response = remove_texts(self.actor.decode(rollout.token_ids[row, start:end].tolist()), self._special)
        return rollout.prompt_messages[row], rollout.prompt_texts[row], response, not bool(rollout.truncated[row])

    def check_templates(self, prompts: Iterable[Messages | None]) -> None:
        """Render one prompt for every order of roles that the prompts have.

        Raises:
            ValueError: The template refuses one of them.
        """
        orders = {
            tuple(message["role"] for message in messages): messages for messages in prompts if messages is not None
        }
        for messages in orders.values():
            try:
                encode_responses(self.encoder, [(messages, "", "Yes", True)])
            except ValueError as error:
                raise ValueError(f"{self.role}.re_encode: {error}; set {self.role}.re_encode.chat_template") from error

    def collect(self) -> dict[str, float]:
        """Return the mean length and the number of cut sequences since the last call; {} if there were none. Starts counting again."""
        lengths, self._lengths = torch.tensor(self._lengths, dtype=torch.float64), []
        if not len(lengths):
            return {}
        num_cut = (lengths > self.max_tokens).sum()
        return {"length/mean": float(lengths.mean()), "num_cut": float(num_cut)}


def load_re_encoders(
    reward_models: Mapping[str, RewardRoleConfig],
    data_config: DataConfig,
    actor: TextEncoder,
    datasets: Sequence[Dataset[PromptExample]],
) -> dict[str, ReEncoder]:
    """Return the re-encoders of reward models that have a tokenizer of their own, by role.

    Args:
        reward_models: Sections of the reward models, by role.
        data_config: The ``data`` section.
        actor: Tokenizer and template of the actor.
        datasets: Prompts of the run, held-out ones too.

    Raises:
        ValueError: A reward model has no tokenizer or template, or one that does not take the prompts; prompts have tools.
    """
    found = {}
    for name, role in reward_models.items():
        if role.re_encode is not None:
            encoder = load_reward_encoder(role, data_config, name, actor.started_at)
            found[name] = ReEncoder(name, encoder, actor, role.re_encode.max_tokens)
            found[name].check_templates(example.messages for data in datasets for example in data.examples)
            for data in datasets:
                if any(example.tools is not None for example in data.examples):
                    raise ValueError(
                        f"{data.report.path}: rows have tools, which are not encoded again for {name}; use a reward model of the actor's "
                        f"tokenizer and set {name}.re_encode=null"
                    )
    return found


def special_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the texts that the tokenizer reads as special tokens, the longest first."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*tokenizer.all_special_tokens, *added}, key=lambda text: (-len(text), text))


def remove_texts(text: str, parts: list[str]) -> str:
    """Return ``text`` without the parts, repeated until removing one leaves no new one."""
    before = None
    while before != text:
        before = text
        for part in parts:
            text = text.replace(part, "")
    return text

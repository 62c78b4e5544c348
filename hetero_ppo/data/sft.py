"""SFT examples: multi-turn ``messages``, or ``prompt`` and ``completion``, with the loss on the answers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hetero_ppo.config.schema import DataConfig
from hetero_ppo.data.chat_template import TextEncoder
from hetero_ppo.data.conversation import (
    Conversation,
    EncodedSequence,
    PlainPair,
    conversation,
    encode_sequences,
)
from hetero_ppo.data.dataset import Dataset, encode_in_blocks, make_dataset
from hetero_ppo.data.prompts import prompt_messages
from hetero_ppo.data.reading import Row, read_rows


@dataclass(frozen=True)
class SftExample:
    """One conversation."""

    token_ids: list[int]  # ends with the end-of-sequence token
    answer_spans: list[tuple[int, int]]  # [start, end) into token_ids, end-of-sequence tokens included

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def all_ids(self) -> list[list[int]]:
        return [self.token_ids, [border for span in self.answer_spans for border in span]]


def load_sft(path: str, data: DataConfig, encoder: TextEncoder) -> Dataset[SftExample]:
    """Read and tokenise ``path``; over-long examples as ``data.overlong_prompts`` says.

    A row has ``data.messages_key``, of which every assistant message is an answer; or ``data.prompt_key`` and
    ``data.completion_key``, each text or messages, of which the completion is the answer.

    Raises:
        FileNotFoundError, ValueError: names file, line and field.
    """

    def encode(block: Sequence[Row]) -> list[SftExample]:
        items = [_item(row, data, encoder.template is not None) for row in block]
        return [_example(sequence) for sequence in encode_sequences(encoder, items)]

    return make_dataset(
        path,
        encode_in_blocks(read_rows(path), encode),
        data.max_sequence_tokens,
        "data.max_sequence_tokens",
        data.overlong_prompts,
        lambda example: False,
    )


def _example(sequence: EncodedSequence) -> SftExample:
    return SftExample(sequence.token_ids, sequence.answer_spans)


def _item(row: Row, data: DataConfig, with_template: bool) -> PlainPair | Conversation:
    if not with_template:
        if row.has(data.messages_key) and not row.has(data.completion_key):
            raise row.error(
                data.messages_key,
                f"messages need a chat template and data.apply_chat_template is false; set it to true, or give "
                f"{data.prompt_key!r} and {data.completion_key!r}",
            )
        return PlainPair(row, row.text(data.prompt_key), row.text(data.completion_key))
    if row.has(data.messages_key):
        return conversation(row, data.messages_key, row.messages(data.messages_key), first_answer=0)
    if not row.has(data.prompt_key):
        row.value(data.messages_key)  # raises: the row has neither of the two forms
    prompt = prompt_messages(row, data.prompt_key)
    return conversation(row, data.completion_key, prompt + answer_messages(row, data.completion_key), len(prompt))


def answer_messages(row: Row, field: str) -> list[dict]:
    """An answer as messages: text becomes one assistant message.

    Raises:
        ValueError: neither text nor messages.
    """
    if isinstance(row.value(field), list):
        return row.messages(field)
    return [{"role": "assistant", "content": row.text(field)}]

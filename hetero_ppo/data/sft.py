"""SFT examples: multi-turn ``messages``, or ``prompt`` and ``completion``. The loss is on the answers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hetero_ppo.config.schema import SftDataConfig
from hetero_ppo.data.chat_template import TextEncoder
from hetero_ppo.data.conversation import (
    Conversation,
    EncodedSequence,
    PlainPair,
    conversation,
    encode_sequences,
)
from hetero_ppo.data.dataset import Dataset, DatasetRules, encode_in_blocks, make_dataset
from hetero_ppo.data.file_notes import file_notes
from hetero_ppo.data.node_share import OWN_FILES, DataPlace
from hetero_ppo.data.prompts import prompt_messages, refuse_tools
from hetero_ppo.data.reading import Message, Row, iter_rows

#: Options that name the fields of a row.
KEYS = ("messages_key", "prompt_key", "completion_key", "tools_key")


@dataclass(frozen=True)
class SftExample:
    """One conversation with its answers."""

    token_ids: list[int]  # ends with the end-of-sequence token
    answer_spans: list[tuple[int, int]]  # [start, end) into token_ids, end-of-sequence tokens included

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def all_ids(self) -> list[list[int]]:
        return [self.token_ids, [border for span in self.answer_spans for border in span]]


class SftCodec:
    """Stored form of an example: its ids and the borders of its answers."""

    num_lists = 2

    def pack(self, example: SftExample) -> tuple[list[list[int]], None]:
        """Return the lists of an example; there is no record."""
        return example.all_ids, None

    def unpack(self, lists: list[list[int]], record: None) -> SftExample:
        """Build the example from its lists."""
        ids, borders = lists
        return SftExample(ids, list(zip(borders[::2], borders[1::2], strict=True)))


def load_sft(path: str, data: SftDataConfig, encoder: TextEncoder, place: DataPlace = OWN_FILES) -> Dataset[SftExample]:
    """Read and tokenise the examples of a file. ``data.overlong_prompts`` decides about examples that are too long.

    A row has ``data.messages_key``, in which every assistant message is an answer; or ``data.prompt_key`` and ``data.completion_key``, each
    text or messages, in which the completion is the answer.

    Args:
        path: ``.jsonl`` or ``.parquet`` file.
        data: Data section, with the names of the fields and the limits.
        encoder: Tokenizer and template.
        place: Process that reads, and folder of the stored examples.

    Raises:
        FileNotFoundError, ValueError: The file cannot be read; the message names file, line and field.
    """

    def encode(block: Sequence[Row]) -> list[SftExample]:
        items = [_item(row, data, encoder.template is not None) for row in block]
        return [_example(sequence) for sequence in encode_sequences(encoder, items)]

    return make_dataset(
        path,
        encode_in_blocks(path, iter_rows(path), encode),
        DatasetRules(
            data.max_sequence_tokens,
            "data.max_sequence_tokens",
            data.overlong_prompts,
            lambda example: False,
            lambda facts: file_notes(facts, data, KEYS, encoder.template),
        ),
        SftCodec(),
        place,
    )


def _example(sequence: EncodedSequence) -> SftExample:
    return SftExample(sequence.token_ids, sequence.answer_spans)


def _item(row: Row, data: SftDataConfig, with_template: bool) -> PlainPair | Conversation:
    if not with_template:
        refuse_tools(row, data)
        if row.has(data.messages_key) and not row.has(data.completion_key):
            raise row.error(
                data.messages_key,
                f"messages need a chat template and data.apply_chat_template is false; set it to true, or give "
                f"{data.prompt_key!r} and {data.completion_key!r}",
            )
        return PlainPair(row, row.text(data.prompt_key), row.text(data.completion_key))
    tools = row.tools(data.tools_key)
    if row.has(data.messages_key):
        messages = row.messages(data.messages_key, with_turn_keys=True)
        return conversation(row, data.messages_key, messages, 0, tools)
    if not row.has(data.prompt_key):
        row.value(data.messages_key)  # raises: the row has neither of the two forms
    prompt = prompt_messages(row, data.prompt_key)
    answer = answer_messages(row, data.completion_key, with_turn_keys=True)
    return conversation(row, data.completion_key, prompt + answer, len(prompt), tools)


def answer_messages(row: Row, field: str, *, with_turn_keys: bool = False) -> list[Message]:
    """Return an answer as messages; text becomes one assistant message.

    Args:
        row: Row of the data file.
        field: Key of the answer.
        with_turn_keys: Whether messages may say if SFT learns from them.

    Raises:
        ValueError: The field is neither text nor messages.
    """
    if isinstance(row.value(field), list):
        return row.messages(field, with_turn_keys=with_turn_keys)
    return [{"role": "assistant", "content": row.text(field)}]

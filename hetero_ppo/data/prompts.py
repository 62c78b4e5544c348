"""Prompts of a PPO run: ``prompt`` (text or messages) or ``messages``, with an optional label and metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hetero_ppo.config.schema import DataConfig, PromptDataConfig
from hetero_ppo.data.chat_template import TextEncoder
from hetero_ppo.data.conversation import Context, check_begin, encode_contexts
from hetero_ppo.data.dataset import Dataset, DatasetRules, encode_in_blocks, make_dataset
from hetero_ppo.data.file_notes import LabelTypes, file_notes
from hetero_ppo.data.node_share import OWN_FILES, DataPlace
from hetero_ppo.data.reading import Message, Row, iter_rows

#: Options that name the fields of a row.
KEYS = ("prompt_key", "messages_key", "tools_key", "label_key", "metadata_key")


@dataclass(frozen=True)
class PromptExample:
    """One prompt, ready for the generator."""

    prompt_ids: list[int]  # ids with the template applied, up to where the answer begins
    text: str  # the user's question: the row's text, or its last message
    messages: list[Message] | None  # messages that the template rendered; None without a template
    label: Any  # value of the label key, or None
    metadata: dict[str, Any]
    index: int  # row of the file, from 0; the same whether or not other rows are left out
    tools: list[dict[str, Any]] | None = None  # tools that the messages may call

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def all_ids(self) -> list[list[int]]:
        return [self.prompt_ids]


class PromptCodec:
    """Stored form of a prompt: its ids and the values of its row. Text and messages are stored once if one follows from the other."""

    num_lists = 1

    def __init__(self, with_template: bool) -> None:
        """Store prompts of one run.

        Args:
            with_template: Whether examples have messages.
        """
        self.with_template = with_template

    def pack(self, example: PromptExample) -> tuple[list[list[int]], list[Any]]:
        """Return the ids of a prompt, and a record of the other values."""
        prompt = example.text if example.messages in (None, user_message(example.text)) else example.messages
        return [example.prompt_ids], [prompt, example.label, example.metadata, example.index, example.tools]

    def unpack(self, lists: list[list[int]], record: list[Any]) -> PromptExample:
        """Build the prompt from its ids and its record."""
        prompt, label, metadata, index, tools = record
        text, messages = (prompt, user_message(prompt)) if isinstance(prompt, str) else (prompt[-1]["content"], prompt)
        return PromptExample(lists[0], text, messages if self.with_template else None, label, metadata, index, tools)


def load_prompts(
    path: str, data: PromptDataConfig, encoder: TextEncoder, place: DataPlace = OWN_FILES
) -> Dataset[PromptExample]:
    """Read and tokenise the prompts of a file, with the template applied. ``data.overlong_prompts`` decides about prompts that are too long.

    A row has the prompt under ``data.prompt_key`` or, without that, under ``data.messages_key``.

    Args:
        path: ``.jsonl`` or ``.parquet`` file.
        data: Data section, with the names of the fields and the limits.
        encoder: Tokenizer and template.
        place: Process that reads, and folder of the stored examples.

    Raises:
        FileNotFoundError, ValueError: The file cannot be read; the message names file, line and field.
    """
    labels = LabelTypes(data)

    def encode(block: Sequence[Row]) -> list[PromptExample]:
        ids = _encode_prompts(block, data, encoder)
        examples = [_example(row, data, encoder, prompt_ids) for row, prompt_ids in zip(block, ids, strict=True)]
        labels.add(example.label for example in examples)
        return examples

    return make_dataset(
        path,
        encode_in_blocks(path, iter_rows(path), encode),
        DatasetRules(
            data.max_prompt_tokens,
            "data.max_prompt_tokens",
            data.overlong_prompts,
            lambda example: False,
            lambda facts: [*labels.notes(facts), *file_notes(facts, data, KEYS, encoder.template)],
        ),
        PromptCodec(encoder.template is not None),
        place,
    )


def _example(row: Row, data: PromptDataConfig, encoder: TextEncoder, prompt_ids: list[int]) -> PromptExample:
    messages = None if encoder.template is None else prompt_messages(row, prompt_field(row, data))
    return PromptExample(
        prompt_ids,
        _question(row, data),
        messages,
        row.get(data.label_key),
        _metadata(row, data),
        row.index,
        None if messages is None else row.tools(data.tools_key),
    )


def _encode_prompts(block: Sequence[Row], data: PromptDataConfig, encoder: TextEncoder) -> list[list[int]]:
    if encoder.template is None:
        for row in block:
            refuse_tools(row, data)
        ids = encoder.encode([row.text(prompt_field(row, data)) for row in block])
        ids = [encoder.prefix_ids + prompt_ids for prompt_ids in ids]
        for row, prompt_ids in zip(block, ids, strict=True):
            check_begin(encoder, row, prompt_ids)
        return ids
    return encode_contexts(encoder, [_context(row, data) for row in block])


def _context(row: Row, data: PromptDataConfig) -> Context:
    field = prompt_field(row, data)
    messages = prompt_messages(row, field)
    if messages[-1]["role"] == "assistant":
        raise row.error(field, "the last message is the assistant's; a prompt ends with what the model has to answer")
    return Context(row, field, messages, row.tools(data.tools_key))


def refuse_tools(row: Row, data: DataConfig) -> None:
    """Raise ValueError when a row of a run without a template has tools."""
    if row.tools(data.tools_key) is not None:
        raise row.error(data.tools_key, "tools are written by a chat template, and data.apply_chat_template is false")


def _question(row: Row, data: PromptDataConfig) -> str:
    field = prompt_field(row, data)
    return row.messages(field)[-1]["content"] if isinstance(row.value(field), list) else row.text(field)


def prompt_field(row: Row, data: PromptDataConfig) -> str:
    """Return ``data.prompt_key`` if the row has it, else ``data.messages_key`` if the row has that, else ``data.prompt_key`` for the error."""
    if not row.has(data.prompt_key) and row.has(data.messages_key):
        return data.messages_key
    return data.prompt_key


def prompt_messages(row: Row, field: str) -> list[Message]:
    """Return the prompt as messages; text becomes one user message.

    Raises:
        ValueError: The field is neither text nor messages.
    """
    if isinstance(row.value(field), list):
        return row.messages(field)
    return user_message(row.text(field))


def user_message(text: str) -> list[Message]:
    """Return the conversation that consists of one text of the user."""
    return [{"role": "user", "content": text}]


def _metadata(row: Row, data: PromptDataConfig) -> dict[str, Any]:
    if not row.has(data.metadata_key):
        return {}
    metadata = row.value(data.metadata_key)
    if not isinstance(metadata, dict):
        raise row.error(data.metadata_key, f"expected an object, got {type(metadata).__name__}")
    return metadata


def labels_digest(examples: Iterable[PromptExample]) -> str:
    """Return a SHA-256 of the labels and metadata of all prompts, in order: the values that a reward function gets in addition to the texts."""
    digest = hashlib.sha256()
    for example in examples:
        text = json.dumps([example.label, example.metadata], sort_keys=True, default=repr)
        digest.update(f"{len(text)} {text}".encode())
    return digest.hexdigest()

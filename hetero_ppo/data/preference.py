"""Preference pairs: ``prompt``, ``chosen`` and ``rejected``, as text, as messages, or as two whole conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hetero_ppo.config.schema import PreferenceDataConfig
from hetero_ppo.data.chat_template import TextEncoder
from hetero_ppo.data.conversation import Conversation, PlainPair, conversation, encode_sequences
from hetero_ppo.data.dataset import Dataset, DatasetRules, encode_in_blocks, make_dataset
from hetero_ppo.data.file_notes import file_notes
from hetero_ppo.data.node_share import OWN_FILES, DataPlace
from hetero_ppo.data.prompts import prompt_messages, refuse_tools
from hetero_ppo.data.reading import Message, Row, iter_rows
from hetero_ppo.data.sft import answer_messages

#: Options that name the fields of a row.
KEYS = ("prompt_key", "chosen_key", "rejected_key", "tools_key")


@dataclass(frozen=True)
class PreferenceExample:
    """One prompt with two answers."""

    chosen_ids: list[int]  # prompt and answer, ending with the end-of-sequence token
    rejected_ids: list[int]
    prompt_length: int  # tokens of the prompt that the two share

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the longer sequence."""
        return max(len(self.chosen_ids), len(self.rejected_ids))

    @property
    def all_ids(self) -> list[list[int]]:
        return [self.chosen_ids, self.rejected_ids]


class PreferenceCodec:
    """Stored form of a pair: the ids of both sequences and the length of their prompt."""

    num_lists = 3

    def pack(self, example: PreferenceExample) -> tuple[list[list[int]], None]:
        """Return the lists of a pair; there is no record."""
        return [example.chosen_ids, example.rejected_ids, [example.prompt_length]], None

    def unpack(self, lists: list[list[int]], record: None) -> PreferenceExample:
        """Build the pair from its lists."""
        chosen, rejected, (prompt_length,) = lists
        return PreferenceExample(chosen, rejected, prompt_length)


def load_preferences(
    path: str, data: PreferenceDataConfig, encoder: TextEncoder, place: DataPlace = OWN_FILES
) -> Dataset[PreferenceExample]:
    """Read and tokenise the pairs of a file. ``data.overlong_prompts`` decides about pairs that are too long.

    A pair whose two answers are the same teaches nothing: it is left out and counted.

    ``data.chosen_key`` and ``data.rejected_key`` hold text, messages that answer ``data.prompt_key``, or whole conversations. With whole
    conversations the prompt may be left out: it is then the part that the two share. Without a chat template and without a prompt, each of
    the two is one whole text.

    Args:
        path: ``.jsonl`` or ``.parquet`` file.
        data: Data section, with the names of the fields and the limits.
        encoder: Tokenizer and template.
        place: Process that reads, and folder of the stored examples.

    Raises:
        FileNotFoundError, ValueError: The file cannot be read; the message names file, line and field.
    """

    def encode(block: Sequence[Row]) -> list[PreferenceExample]:
        items = [item for row in block for item in _pair(row, data, encoder.template is not None)]
        sequences = encode_sequences(encoder, items)
        return [
            PreferenceExample(chosen.token_ids, rejected.token_ids, chosen.prompt_length)
            for chosen, rejected in zip(sequences[::2], sequences[1::2], strict=True)
        ]

    return make_dataset(
        path,
        encode_in_blocks(path, iter_rows(path), encode),
        DatasetRules(
            data.max_sequence_tokens,
            "data.max_sequence_tokens",
            data.overlong_prompts,
            lambda example: example.chosen_ids == example.rejected_ids,
            lambda facts: file_notes(facts, data, KEYS, encoder.template),
        ),
        PreferenceCodec(),
        place,
    )


def _pair(row: Row, data: PreferenceDataConfig, with_template: bool) -> Sequence[PlainPair | Conversation]:
    fields = (data.chosen_key, data.rejected_key)
    if not with_template:
        refuse_tools(row, data)
        prompt_text = row.text(data.prompt_key) if row.has(data.prompt_key) else ""
        return [PlainPair(row, prompt_text, row.text(field)) for field in fields]
    answers = [answer_messages(row, field) for field in fields]
    if row.has(data.prompt_key):
        prompt_of = [prompt_messages(row, data.prompt_key)] * 2
    else:
        prompt_of = [_common_prompt(row, data, answers)] * 2
    items = []
    tools = row.tools(data.tools_key)
    for field, prompt, answer in zip(fields, prompt_of, answers, strict=True):
        if answer[0]["role"] != "assistant":
            if answer[: len(prompt)] != prompt:
                raise row.error(field, f"the conversation does not begin with the messages of {data.prompt_key!r}")
            answer = answer[len(prompt) :]
        if not answer or answer[0]["role"] != "assistant":
            raise row.error(field, "what follows the prompt has to begin with an assistant message")
        items.append(conversation(row, field, prompt + answer, len(prompt), tools))
    return items


def _common_prompt(row: Row, data: PreferenceDataConfig, answers: list[list[Message]]) -> list[Message]:
    """Return the messages that two whole conversations share, up to the first assistant message that differs."""
    if answers[0][0]["role"] == "assistant":
        row.value(data.prompt_key)  # raises: without a prompt, chosen and rejected are whole conversations
    chosen, rejected = answers
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    while shared > 0 and chosen[shared]["role"] != "assistant":
        shared -= 1
    if shared == 0:
        raise row.error(data.rejected_key, f"shares no prompt with {data.chosen_key!r}; the first messages differ")
    return chosen[:shared]

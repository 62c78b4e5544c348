"""Prompts with answers -> one token sequence that knows which of its tokens are answers.

With a chat template the conversation is rendered again and again: up to where each answer begins, and through its end.
The token ids of each of these have to be a prefix of the whole conversation's. This makes the masks exact to the token,
and guarantees that the prompt ids of training are those that generation starts from. A template that rewrites earlier
turns, or a tokenizer that merges over the border of a turn, is an error and not a mask that is off by a few tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hetero_ppo.data.chat_template import TextEncoder
from hetero_ppo.data.reading import Message, Row, excerpt
from hetero_ppo.types import Messages


@dataclass(frozen=True)
class PlainPair:
    """A prompt and its answer, tokenised as they stand and concatenated."""

    row: Row
    prompt: str  # may be empty where the answer holds the prompt
    answer: str


@dataclass(frozen=True)
class Conversation:
    """Messages of which the assistant's are answers, from ``first_answer`` on; the last message is one."""

    row: Row
    field: str  # for error messages
    messages: list[Message]
    first_answer: int  # index into messages; earlier assistant messages belong to the prompt


@dataclass(frozen=True)
class EncodedSequence:
    """Token ids that end with the end-of-sequence token."""

    token_ids: list[int]
    answer_spans: list[tuple[int, int]]  # [start, end) of each answer, its end-of-sequence token included

    @property
    def prompt_length(self) -> int:
        """Tokens before the first answer."""
        return self.answer_spans[0][0]


def conversation(row: Row, field: str, messages: list[Message], first_answer: int) -> Conversation:
    """Check that there is an answer to learn from.

    Raises:
        ValueError: the last message is not the assistant's, or nothing comes before the first answer.
    """
    if messages[-1]["role"] != "assistant":
        raise row.error(field, f"the last message has to be the assistant's, it is the {messages[-1]['role']}'s")
    if messages[0]["role"] == "assistant":
        raise row.error(field, "the first message is the assistant's; an answer needs a prompt before it")
    return Conversation(row, field, messages, first_answer)


def encode_sequences(encoder: TextEncoder, items: Sequence[PlainPair | Conversation]) -> list[EncodedSequence]:
    """Token ids and answer spans of each item, in one call of the tokenizer.

    Raises:
        ValueError: names the row whose rendering is not a prefix of the whole, or that the template refuses.
    """
    texts_of = [_texts(encoder, item) for item in items]
    ids = iter(encoder.encode([text for texts in texts_of for text in texts]))
    encoded = []
    for item, texts in zip(items, texts_of, strict=True):
        pieces = [next(ids) for _ in texts]
        if isinstance(item, PlainPair):
            encoded.append(_encode_pair(encoder, pieces[0], pieces[1]))
        else:
            encoded.append(_encode_conversation(encoder, item, texts, pieces))
    return encoded


def encode_responses(
    encoder: TextEncoder, items: Sequence[tuple[Messages | None, str, str, bool]]
) -> list[list[int]]:
    """Token ids of prompts with a response that a policy made, in one call of the tokenizer.

    Of a finished response the ids are those that ``encode_sequences`` gives for the same conversation. One that is not
    finished has no end-of-sequence token: its ids end with the last one of its text.

    Args:
        encoder: whose template and end-of-sequence token are used.
        items: (messages of the prompt, text of the prompt, text of the response, finished?); the text is read where there is no template.

    Raises:
        ValueError: the template refuses the messages.
    """
    texts = []
    for messages, prompt, response, _ in items:
        if encoder.template is None:
            texts += [prompt, response]
            continue
        assert messages is not None, "prompts of a run with a template have messages"
        answered = [*messages, {"role": "assistant", "content": response}]
        texts.append(encoder.render(messages, add_generation_prompt=True))
        texts.append(encoder.render(answered, add_generation_prompt=False))
    encoded = iter(encoder.encode(texts))
    sequences = []
    for *_, finished in items:
        before, whole = next(encoded), next(encoded)
        if encoder.template is None:
            ids = [*encoder.prefix_ids, *before, *whole]
        else:
            # Of a tokenizer that merges over the border fewer ids are alike; where the answer ends is known all the same.
            start = next((n for n, (a, b) in enumerate(zip(before, whole)) if a != b), min(len(before), len(whole)))
            end = _answer_end(encoder, whole, start)
            ids = whole[: end - 1] if end > start and whole[end - 1] == encoder.eos_token_id else whole[:end]
        sequences.append([*ids, encoder.eos_token_id] if finished else ids)
    return sequences


def _texts(encoder: TextEncoder, item: PlainPair | Conversation) -> list[str]:
    """Plain: prompt, answer. Conversation: for each answer the text before it and the text through it."""
    if isinstance(item, PlainPair):
        return [item.prompt, item.answer]
    try:
        return list(_renderings(encoder, item))
    except ValueError as error:
        raise item.row.error(item.field, str(error)) from error


def _renderings(encoder: TextEncoder, item: Conversation) -> Iterator[str]:
    for position in range(item.first_answer, len(item.messages)):
        if item.messages[position]["role"] == "assistant":
            yield encoder.render(item.messages[:position], add_generation_prompt=True)
            yield encoder.render(item.messages[: position + 1], add_generation_prompt=False)


def _encode_pair(encoder: TextEncoder, prompt_ids: list[int], answer_ids: list[int]) -> EncodedSequence:
    prompt_ids = encoder.prefix_ids + prompt_ids
    token_ids = prompt_ids + answer_ids + [encoder.eos_token_id]
    return EncodedSequence(token_ids, [(len(prompt_ids), len(token_ids))])


def _encode_conversation(
    encoder: TextEncoder, item: Conversation, texts: list[str], pieces: list[list[int]]
) -> EncodedSequence:
    whole = pieces[-1]
    for text, piece in zip(texts, pieces, strict=True):
        if whole[: len(piece)] != piece:
            raise _not_a_prefix(item, texts[-1], text)
    spans = []
    for before, through in zip(pieces[::2], pieces[1::2], strict=True):
        spans.append((len(before), _answer_end(encoder, through, len(before))))
    start, end = spans[-1]
    # what a template writes after the end-of-sequence token (ChatML: a line break) is never generated
    token_ids = whole[:end]
    if token_ids[-1] != encoder.eos_token_id:
        token_ids = token_ids + [encoder.eos_token_id]
    spans[-1] = (start, len(token_ids))
    return EncodedSequence(token_ids, spans)


def _answer_end(encoder: TextEncoder, ids: list[int], start: int) -> int:
    """One past the answer's end-of-sequence token; the end of ``ids`` where the template writes none."""
    for position in range(len(ids) - 1, start - 1, -1):
        if ids[position] == encoder.eos_token_id:
            return position + 1
    return len(ids)


def _not_a_prefix(item: Conversation, whole: str, part: str) -> ValueError:
    if whole.startswith(part):
        cause = (
            f"the tokenizer merges over the border after {part[-20:]!r}; end each turn of the template with a special "
            "token or white space"
        )
    else:
        cause = (
            f"the template writes earlier turns differently once later ones follow (it wrote {excerpt(part[-60:])!r}); "
            "set data.chat_template to one that keeps them as they are"
        )
    return item.row.error(
        item.field, f"where an answer begins and ends cannot be told from the chat template's tokens: {cause}"
    )

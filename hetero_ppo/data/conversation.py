"""Encode prompts with answers as one token sequence in which the answers' tokens are marked.

With a chat template the conversation is rendered several times: up to where each answer begins, and up to where it ends. Each of these
texts must be the beginning of the next one; otherwise the place of an answer is unknown. Token ids grow from text to text. If the ids of
the longer text begin with those of the shorter one, they are taken. Otherwise the ids of the rest are appended to the ids so far. So no
token crosses the border of an answer, as in generation, where a model's tokens follow the prompt's. The ids of a prompt depend only on its
own messages. SFT, preference pairs, PPO and reward models that encode texts again all take the same steps, so they agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence, Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from hetero_ppo.data.chat_template import TextEncoder
from hetero_ppo.data.excerpts import excerpt
from hetero_ppo.data.reading import TURN_KEYS, Message, Row, is_learned
from hetero_ppo.types import Messages


@dataclass(frozen=True)
class PlainPair:
    """One prompt and its answer, tokenised as plain text and concatenated."""

    row: Row
    prompt: str  # empty if the answer contains the prompt
    answer: str


@dataclass(frozen=True)
class Conversation:
    """One conversation. From ``first_answer`` on, the assistant's messages are answers; the last message is one."""

    row: Row
    field: str  # key of the messages, for error messages
    messages: list[Message]
    first_answer: int  # index into messages; earlier assistant messages belong to the prompt
    not_learned: frozenset[int] = frozenset()  # indices of answers that are not in the loss
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class EncodedSequence:
    """Token ids of one sequence; the last token is one that ends a sequence."""

    token_ids: list[int]
    #: [start, end) of each answer that is learned, its end-of-sequence token included.
    answer_spans: list[tuple[int, int]]

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first answer."""
        return self.answer_spans[0][0]


@dataclass(frozen=True)
class Cut:
    """A place in the text of a conversation that no token may cross: the beginning or the end of an answer."""

    text: str  # the text before this place
    answer: int | None = None  # index of the message whose answer begins here
    ends: int | None = None  # index of the message whose answer ends here


@dataclass
class GrowingIds:
    """Token ids of a text that is extended step by step."""

    encoder: TextEncoder
    text: str = ""
    ids: list[int] = field(default_factory=list)

    def extend(self, text: str, whole_ids: list[int]) -> None:
        """Extend the text to ``text``, which begins with the present one.

        Args:
            text: Longer text.
            whole_ids: Token ids of the longer text as a whole.
        """
        assert text.startswith(self.text)
        if whole_ids[: len(self.ids)] == self.ids:
            self.ids = whole_ids
        else:
            self.ids = self.ids + self.encoder.encode_continuations([text[len(self.text) :]])[0]
        self.text = text


def conversation(
    row: Row, field: str, messages: list[Message], first_answer: int, tools: list[dict[str, Any]] | None = None
) -> Conversation:
    """Build a conversation, after checking that it has an answer to learn from.

    Raises:
        ValueError: The last message is not the assistant's, nothing comes before the first answer, or no answer is in the loss.
    """
    if messages[-1]["role"] != "assistant":
        raise row.error(field, f"the last message has to be the assistant's, it is the {messages[-1]['role']}'s")
    if messages[0]["role"] == "assistant":
        raise row.error(field, "the first message is the assistant's; an answer needs a prompt before it")
    answers = [place for place in range(first_answer, len(messages)) if messages[place]["role"] == "assistant"]
    not_learned = frozenset(place for place in answers if not is_learned(messages[place]))
    if len(not_learned) == len(answers):
        raise row.error(
            field, "every answer has weight 0 or train false, so there is nothing to learn; leave the row out"
        )
    shown = [{key: value for key, value in message.items() if key not in TURN_KEYS} for message in messages]
    return Conversation(row, field, shown, first_answer, not_learned, tools)


def encode_sequences(encoder: TextEncoder, items: Sequence[PlainPair | Conversation]) -> list[EncodedSequence]:
    """Return token ids and answer spans of each item, with few calls of the tokenizer.

    Raises:
        ValueError: The template refuses a row, or a rendered part of a row is not a prefix of the whole. The message names the row.
    """
    pairs = iter(_encode_pairs(encoder, [item for item in items if isinstance(item, PlainPair)]))
    cuts_of = [[] if isinstance(item, PlainPair) else _cuts_of_row(encoder, item) for item in items]
    ids = iter(encoder.encode([cut.text for cuts in cuts_of for cut in cuts]))
    encoded = []
    for item, cuts in zip(items, cuts_of, strict=True):
        if isinstance(item, PlainPair):
            sequence = next(pairs)
        else:
            sequence = _encode_conversation(encoder, item, cuts, [next(ids) for _ in cuts])
        check_begin(encoder, item.row, sequence.token_ids)
        encoded.append(sequence)
    return encoded


@dataclass(frozen=True)
class Context:
    """Messages of one prompt, up to where a model answers."""

    row: Row
    field: str  # key of the messages, for error messages
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


def encode_contexts(encoder: TextEncoder, items: Sequence[Context]) -> list[list[int]]:
    """Return the token ids of prompts up to where the answer begins, with one call of the tokenizer.

    Raises:
        ValueError: The template refuses the messages of a row, which the message names.
    """
    cuts_of = []
    for item in items:
        try:
            cuts_of.append(_cuts(encoder, item.messages, item.tools, None))
        except ValueError as error:
            raise item.row.error(item.field, str(error)) from error
    ids = iter(encoder.encode([cut.text for cuts in cuts_of for cut in cuts]))
    contexts = []
    for item, cuts in zip(items, cuts_of, strict=True):
        try:
            contexts.append(_grow(encoder, cuts, [next(ids) for _ in cuts])[-1])
        except ValueError as error:
            raise item.row.error(item.field, str(error)) from error
        check_begin(encoder, item.row, contexts[-1])
    return contexts


def encode_responses(encoder: TextEncoder, items: Sequence[tuple[Messages | None, str, str, bool]]) -> list[list[int]]:
    """Return the token ids of prompts with a response that a policy generated, with one call of the tokenizer.

    A finished response has the ids that ``encode_sequences`` gives for the same conversation. An unfinished one has no end-of-sequence
    token: its ids end with the last one of its text.

    Args:
        encoder: Tokenizer, template and end-of-sequence token.
        items: Tuples of (messages of the prompt, text of the prompt, text of the response, finished?). The prompt's text is read only
            without a template.

    Raises:
        ValueError: The template refuses the messages.
    """
    if encoder.template is None:
        befores = encoder.encode([prompt for _, prompt, _, _ in items])
        afters = encoder.encode_continuations([response for _, _, response, _ in items])
        return [
            [*encoder.prefix_ids, *before, *after, *([encoder.eos_token_id] if finished else [])]
            for (*_, finished), before, after in zip(items, befores, afters, strict=True)
        ]
    ends, sequences = encoder.written_end_ids, []
    for (*_, finished), (before, after) in zip(items, _render_responses(encoder, items), strict=True):
        end = _answer_end(ends, after, 0)
        ended = end > 0 and after[end - 1] in ends
        ids = [*before, *(after[: end - 1] if ended else after[:end])]
        sequences.append([*ids, after[end - 1] if ended else encoder.eos_token_id] if finished else ids)
    return sequences


def _render_responses(
    encoder: TextEncoder, items: Sequence[tuple[Messages | None, str, str, bool]]
) -> list[tuple[list[int], list[int]]]:
    """Return (ids before the response, ids of the response and of the template's text after it) of each item."""
    cuts_of = []
    for messages, _, response, _ in items:
        assert messages is not None, "prompts of a run with a template have messages"
        answered = [*messages, {"role": "assistant", "content": response}]
        cuts_of.append(_cuts(encoder, answered, None, len(messages)))
    ids = iter(encoder.encode([cut.text for cuts in cuts_of for cut in cuts]))
    pairs = []
    for cuts in cuts_of:
        pieces = [next(ids) for _ in cuts]
        if cuts[-1].text.startswith(cuts[-2].text):
            *_, before, whole = _grow(encoder, cuts, pieces)
            pairs.append((before, whole[len(before) :]))
        else:  # the template changes the prompt once an answer follows; the answer begins where the two texts differ
            before, whole = pieces[-2:]
            start = next((n for n, (a, b) in enumerate(zip(before, whole)) if a != b), min(len(before), len(whole)))
            pairs.append((whole[:start], whole[start:]))
    return pairs


def check_begin(encoder: TextEncoder, row: Row, token_ids: list[int]) -> None:
    """Raise ValueError when a sequence has two begin-of-sequence tokens: one from the template or the text, one from the tokenizer."""
    bos = encoder.tokenizer.bos_token_id
    if bos is not None and token_ids[:2] == [bos, bos]:
        raise ValueError(
            f"{row.place}: the sequence begins with {encoder.tokenizer.bos_token!r} twice; take it out of the text, or let the "
            "template write it once"
        )


def _cuts_of_row(encoder: TextEncoder, item: Conversation) -> list[Cut]:
    """Return the cuts of a conversation, after checking that the place of every learned answer is known.

    Raises:
        ValueError: The template refuses the messages, or writes earlier ones differently once later ones follow.
    """
    try:
        cuts = _cuts(encoder, item.messages, item.tools, item.first_answer)
    except ValueError as error:
        raise item.row.error(item.field, str(error)) from error
    for cut, following in itertools.pairwise(cuts):
        if not following.text.startswith(cut.text):
            raise item.row.error(
                item.field,
                "where an answer begins and ends cannot be told from the chat template's text: the template writes earlier turns "
                f"differently once later ones follow (it wrote {excerpt(cut.text[-60:])!r}); set data.chat_template to one that keeps "
                "them as they are",
            )
    return cuts


def _cuts(
    encoder: TextEncoder, messages: Messages, tools: list[dict[str, Any]] | None, first_answer: int | None
) -> list[Cut]:
    """Return where answers begin and end, in order. The last cut is the end of the whole text.

    Args:
        encoder: Encoder whose template renders.
        messages: Conversation that ends with an answer, or a prompt.
        tools: Tools that the messages may call.
        first_answer: Index of the first message that is an answer. Cuts of earlier messages are left out if the template writes these
            differently later. None: all messages are a prompt.
    """
    found = list(_renderings(encoder, messages, tools, first_answer))
    if first_answer is None:
        context = found[-1].text
    else:
        context = next(cut.text for cut in found if cut.answer is not None and cut.answer >= first_answer)
    cuts: list[Cut] = []
    for cut in found:
        place = cut.answer if cut.answer is not None else cut.ends
        of_prompt = place is not None and (first_answer is None or place < first_answer)
        grows = not cuts or cut.text.startswith(cuts[-1].text)
        if not of_prompt or (grows and context.startswith(cut.text)):
            cuts.append(cut)
    return cuts


def _renderings(
    encoder: TextEncoder, messages: Messages, tools: list[dict[str, Any]] | None, first_answer: int | None
) -> Iterator[Cut]:
    for place, message in enumerate(messages):
        if message["role"] != "assistant" or place == 0:
            continue
        try:
            before = encoder.render(messages[:place], True, tools)
            through = encoder.render(messages[: place + 1], False, tools)
        except ValueError:
            if first_answer is not None and place >= first_answer:
                raise
            continue  # the template accepts the whole prompt, but not this part of it
        yield Cut(before, answer=place)
        yield Cut(through, ends=place)
    if first_answer is None:
        yield Cut(encoder.render(messages, True, tools))


def _grow(encoder: TextEncoder, cuts: Sequence[Cut], pieces: Sequence[list[int]]) -> list[list[int]]:
    """Return the ids before every cut; each list begins with the one before it."""
    growing, grown = GrowingIds(encoder), []
    for cut, ids in zip(cuts, pieces, strict=True):
        growing.extend(cut.text, ids)
        grown.append(growing.ids)
    return grown


def _encode_pairs(encoder: TextEncoder, items: Sequence[PlainPair]) -> list[EncodedSequence]:
    prompts = encoder.encode([item.prompt for item in items])
    wholes = iter(encoder.encode([item.answer for item in items if not item.prompt]))
    try:
        answers = iter(encoder.encode_continuations([item.answer for item in items if item.prompt]))
    except ValueError as error:
        raise ValueError(f"{items[0].row.path}: {error}") from error
    encoded = []
    for item, prompt in zip(items, prompts, strict=True):
        answer = next(answers) if item.prompt else next(wholes)
        ended = bool(answer) and answer[-1] in encoder.written_end_ids
        prompt_ids = encoder.prefix_ids + prompt
        token_ids = prompt_ids + answer + ([] if ended else [encoder.eos_token_id])
        encoded.append(EncodedSequence(token_ids, [(len(prompt_ids), len(token_ids))]))
    return encoded


def _encode_conversation(
    encoder: TextEncoder, item: Conversation, cuts: list[Cut], pieces: list[list[int]]
) -> EncodedSequence:
    try:
        grown = _grow(encoder, cuts, pieces)
    except ValueError as error:
        raise item.row.error(item.field, str(error)) from error
    ends = encoder.written_end_ids
    starts = {cut.answer: len(ids) for cut, ids in zip(cuts, grown, strict=True) if cut.answer is not None}
    spans = {}
    for cut, ids in zip(cuts, grown, strict=True):
        if cut.ends is not None and cut.ends >= item.first_answer:
            spans[cut.ends] = (starts[cut.ends], _answer_end(ends, ids, starts[cut.ends]))
    last = max(spans)
    start, end = spans[last]
    # the model never generates what a template writes after the end-of-sequence token (ChatML: a line break)
    token_ids = grown[-1][:end]
    if token_ids[-1] not in ends:
        token_ids = token_ids + [encoder.eos_token_id]
    spans[last] = (start, len(token_ids))
    learned = [span for place, span in sorted(spans.items()) if place not in item.not_learned]
    if any(start == end for start, end in learned):
        raise item.row.error(
            item.field, "the chat template writes nothing for an answer, so there is nothing to learn from it"
        )
    return EncodedSequence(token_ids, learned)


def _answer_end(ends: AbstractSet[int], ids: list[int], start: int) -> int:
    """Return the index after the answer's end-of-sequence token, or the length of ``ids`` if the template writes none."""
    for position in range(len(ids) - 1, start - 1, -1):
        if ids[position] in ends:
            return position + 1
    return len(ids)

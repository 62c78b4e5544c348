"""Token ids of a text that continues another one.

Tokenizers in SentencePiece's form begin every text that they encode with a space. The text of an answer is no beginning: the ids
that a model generates after a prompt have no such space unless the answer has one.
"""

from __future__ import annotations

from collections.abc import Callable

#: Texts that other texts are hung on to, to be encoded as what follows; the ids of the anchor are cut off again.
ANCHORS = ("\n", ":", "=", "|", "a")
#: Texts that show whether a beginning is encoded otherwise than what follows.
PROBES = ("a", "B", "1", "?", "the")

Encode = Callable[[list[str]], list[list[int]]]


def adds_prefix(encode: Encode) -> bool:
    """Whether ``encode`` puts something before a text that it does not put before the same text in the middle of another."""
    return not any(_after(encode, anchor, probe) == encode([probe])[0] for anchor in ANCHORS for probe in PROBES)


def encode_continuation(encode: Encode, text: str) -> list[int]:
    """Return the ids of ``text`` in the middle of another one, for an ``encode`` that adds a prefix.

    Raises:
        ValueError: the tokenizer merges the text with everything that stands before it.
    """
    for anchor in ANCHORS:
        ids = _after(encode, anchor, text)
        if ids is not None:
            return ids
    raise ValueError(
        f"the tokenizer puts a space before every text and merges {text[:20]!r} with whatever stands before it, so an answer's own "
        "tokens cannot be told"
    )


def _after(encode: Encode, anchor: str, text: str) -> list[int] | None:
    """The ids of ``text`` after ``anchor``; None where the two share a token."""
    before, whole = encode([anchor, anchor + text])
    return whole[len(before) :] if before and whole[: len(before)] == before else None

"""Token ids of a text that continues another one.

SentencePiece-like tokenizers put a space before every text that they encode. An answer continues a prompt: the ids that a model generates
after a prompt have no such space unless the answer itself has one.
"""

from __future__ import annotations

from collections.abc import Callable

#: Texts that are put before another text, so that it is encoded as a continuation. Their ids are cut off afterwards.
ANCHORS = ("\n", ":", "=", "|", "a")
#: Texts that show whether the tokenizer encodes a beginning differently from a continuation.
PROBES = ("a", "B", "1", "?", "the")

Encode = Callable[[list[str]], list[list[int]]]


def adds_prefix(encode: Encode) -> bool:
    """Return whether ``encode`` puts something before a text that it does not put before the same text inside another one."""
    return not any(_after(encode, anchor, probe) == encode([probe])[0] for anchor in ANCHORS for probe in PROBES)


def encode_continuation(encode: Encode, text: str) -> list[int]:
    """Return the ids of ``text`` inside another text, for an ``encode`` that adds a prefix.

    Raises:
        ValueError: The tokenizer merges the text with everything that stands before it.
    """
    for anchor in ANCHORS:
        ids = _after(encode, anchor, text)
        if ids is not None:
            return ids
    raise ValueError(
        f"the tokenizer puts a space before every text and merges {text[:20]!r} with whatever stands before it, so an answer's own "
        "tokens cannot be separated"
    )


def _after(encode: Encode, anchor: str, text: str) -> list[int] | None:
    """Return the ids of ``text`` after ``anchor``; None if the two share a token."""
    before, whole = encode([anchor, anchor + text])
    return whole[len(before) :] if before and whole[: len(before)] == before else None

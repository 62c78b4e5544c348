"""Function rewards for GSM8K: is the final number of an answer the right one?

A GSM8K answer ends with a line ``#### 1,234``. A response is read the same way; without such a mark its last number
counts, so that a model that was never shown the format can be scored too.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

#: An optional sign (before or after a currency sign), then digits in groups of three, or digits, or a fraction alone.
NUMBER = re.compile(
    r"(?<![\w.])([-\u2212]?)[$\u20ac\u00a3]?([-\u2212]?)(\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
)

#: What comes before the final number.
MARK = "####"

#: The reward of ``graded`` for a response that ends with a mark and a number, where the number is wrong.
FORMAT_SCORE = 0.1


def numbers(text: str) -> list[Decimal]:
    """The numbers of ``text``, in order: ``-1,234.50`` is one, a unit or sign of currency around it does not matter."""
    found = []
    for before, after, digits in NUMBER.findall(text):
        value = Decimal(digits.replace(",", ""))
        found.append(-value if before or after else value)
    return found


def marked_number(text: str) -> Decimal | None:
    """The first number after the last ``####``; None without a mark, or without a number on its line."""
    _, mark, rest = text.rpartition(MARK)
    if not mark:
        return None
    found = numbers(rest.strip().split("\n")[0])
    return found[0] if found else None


def answer_number(text: str) -> Decimal | None:
    """The final number of a response: the marked one, else the last; None where there is no number at all."""
    marked = marked_number(text)
    if marked is not None:
        return marked
    found = numbers(text)
    return found[-1] if found else None


def right_number(label: Any, prompt: str) -> Decimal:
    """The number of a GSM8K answer.

    Raises:
        ValueError: the label has no marked number.
    """
    right = marked_number(label) if isinstance(label, str) else None
    if right is None:
        raise ValueError(
            f"the label of prompt {prompt[:60]!r} has no number after {MARK}: {str(label)[-60:]!r}; "
            "data.label_key has to name the field with the worked answer"
        )
    return right


def final_number(prompt: str, response: str, label: Any, metadata: dict[str, Any]) -> float:
    """1.0 where the final number of ``response`` is that of the worked answer ``label``, 0.0 otherwise."""
    return float(answer_number(response) == right_number(label, prompt))


def graded(prompt: str, response: str, label: Any, metadata: dict[str, Any]) -> float:
    """As ``final_number``, and ``FORMAT_SCORE`` for a wrong number behind the mark: a signal where none is right yet."""
    if final_number(prompt, response, label, metadata):
        return 1.0
    return FORMAT_SCORE if marked_number(response) is not None else 0.0

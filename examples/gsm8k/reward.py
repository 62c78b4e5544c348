"""Function rewards for GSM8K: they compare the final number of a response with that of the worked answer.

A GSM8K answer ends with a line ``#### 1,234``. A response is read the same way. Without such a mark its last number
counts, so that a model that has never seen the format gets a score too.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

#: An optional sign (before or after a currency sign), then digits in groups of three, or digits, or a fraction alone.
NUMBER = re.compile(
    r"(?<![\w.])([-\u2212]?)[$\u20ac\u00a3]?([-\u2212]?)(\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
)

#: Text before the final number.
MARK = "####"

#: Reward that ``graded`` gives a response with a wrong number after the mark.
FORMAT_SCORE = 0.1


def numbers(text: str) -> list[Decimal]:
    """Return the numbers of ``text`` in order. ``-1,234.50`` is one number; units and signs of currency do not matter."""
    found = []
    for before, after, digits in NUMBER.findall(text):
        value = Decimal(digits.replace(",", ""))
        found.append(-value if before or after else value)
    return found


def marked_number(text: str) -> Decimal | None:
    """Return the first number after the last ``####``, or None without a mark or without a number on its line."""
    _, mark, rest = text.rpartition(MARK)
    if not mark:
        return None
    found = numbers(rest.strip().split("\n")[0])
    return found[0] if found else None


def answer_number(text: str) -> Decimal | None:
    """Return the final number of a response: the marked one, else the last one, or None without any number."""
    marked = marked_number(text)
    if marked is not None:
        return marked
    found = numbers(text)
    return found[-1] if found else None


def right_number(label: Any, prompt: str) -> Decimal:
    """Return the number of a GSM8K answer.

    Raises:
        ValueError: The label has no marked number.
    """
    right = marked_number(label) if isinstance(label, str) else None
    if right is None:
        raise ValueError(
            f"the label of prompt {prompt[:60]!r} has no number after {MARK}: {str(label)[-60:]!r}; "
            "data.label_key has to name the field with the worked answer"
        )
    return right


def final_number(prompt: str, response: str, label: Any, metadata: dict[str, Any]) -> float:
    """Return 1.0 if the final number of ``response`` is that of the worked answer ``label``, else 0.0."""
    return float(answer_number(response) == right_number(label, prompt))


def graded(prompt: str, response: str, label: Any, metadata: dict[str, Any]) -> float:
    """Return 1.0 for the right number, and ``FORMAT_SCORE`` for a wrong number after the mark.

    So a policy that finds no right number yet gets a signal too.
    """
    if final_number(prompt, response, label, metadata):
        return 1.0
    return FORMAT_SCORE if marked_number(response) is not None else 0.0

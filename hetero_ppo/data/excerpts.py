"""Shorten bad values for error messages."""

from __future__ import annotations

import json

#: Number of characters of a bad value that an error shows.
EXCERPT_LENGTH = 60


def excerpt(value: object) -> str:
    """Return the start of ``value`` on one line."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text[: 20 * EXCERPT_LENGTH].split())
    return text if len(text) <= EXCERPT_LENGTH else text[: EXCERPT_LENGTH - 3] + "..."

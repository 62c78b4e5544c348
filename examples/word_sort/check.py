"""The exact check of the demo. It scores held-out answers; no training stage sees it."""

from __future__ import annotations

from typing import Any


def exact(prompt: str, response: str, label: Any, metadata: dict[str, Any]) -> float:
    """Return 1.0 if the answer is the prompt's words in alphabetical order and nothing else, else 0.0.

    ``label`` is the right answer, with one space between words. Space around the answer is ignored; case, order, missing,
    repeated and additional words are not.
    """
    if not isinstance(label, str) or not label:
        raise ValueError(f"the word-sort check needs the right answer as label, got {label!r} for prompt {prompt!r}")
    return float(response.strip() == label)

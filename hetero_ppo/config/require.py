"""The form of a config error: field, value, rule."""

from __future__ import annotations


def require(condition: bool, field: str, value: object, rule: str) -> None:
    """Raise a ValueError that names field, value and rule where ``condition`` is false."""
    if not condition:
        raise ValueError(f"{field}={value}: {rule}")

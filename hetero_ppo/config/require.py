"""The form of a config error: field, value, rule."""

from __future__ import annotations


def require(condition: bool, field: str, value: object, rule: str) -> None:
    """Raises ValueError with all three where ``condition`` is false."""
    if not condition:
        raise ValueError(f"{field}={value}: {rule}")

"""Read JSON without the ambiguities that Python's reader accepts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, NoReturn


def parse_json(text: str) -> Any:
    """Parse one JSON document.

    Raises:
        ValueError: The JSON is invalid, an object has a key twice, a number is NaN or infinite, a text has half of a surrogate pair, or a
            value is nested too deeply.
    """
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at column {error.colno})") from error
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\ud" in text or "\\uD" in text:
        for path, part in _texts(value, ""):
            check_unicode(path, part)
    return value


def check_unicode(path: str, text: str) -> None:
    """Raise ValueError when ``text`` has half of a surrogate pair, which no tokenizer accepts.

    Args:
        path: Dotted name of the text inside its row.
        text: Text to check.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(
            f"field {path!r}: character {error.start + 1} is half of a surrogate pair (\\u{code:04x}), which is not text; "
            "the program that wrote the file cut an emoji or another wide character in two"
        ) from None


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield every text inside ``value``, keys included, with its path."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            inner = f"{path}.{key}" if path else key
            yield inner, key
            yield from _texts(item, inner)
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from _texts(item, f"{path}[{position}]")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(
            f"the key {twice!r} is there twice in one object, and it is unclear which value counts; keep one of them"
        )
    return values


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value; write null, or leave the key out")


def _float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text} is too large for a float")
    return number


def _int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


#: Python refuses to read longer integers from text.
_MAX_DIGITS = 4000
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int)

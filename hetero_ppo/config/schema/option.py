"""Declare an option with its default, documentation, unit, bounds and rule on resume; and read these back.

All of it lives in the metadata of the dataclass field, so a class that inherits an option inherits its documentation too.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

#: Unit of a number that counts or measures nothing: a weight, a factor, a seed.
PLAIN = "plain number"
_KEY = "option"


class OnResume(Enum):
    """Rule for an option whose value differs from the checkpoint's when a run resumes."""

    section = "its fields decide"
    start = "belongs to one start of a run, and is not compared"
    operation = "applied; it changes how the run works, and no number except by rounding"
    applied = "applied from the next step on"
    objective = "refused unless checkpoint.allow_changes names it"
    form = "refused: the checkpoint is stored in this form"
    content = "compared by content; where it is found may change"
    weights = (
        "frozen role: compared by digest of the weights; trained role: no effect, its weights are the checkpoint's"
    )
    dtype = "frozen role: refused unless checkpoint.allow_changes names it; trained role: refused, the checkpoint is stored in this form"
    no_effect = "no effect: the checkpoint has what it would decide"
    newer = "newer than the checkpoint, with its default; applied"  # found by comparing; no option declares it


@dataclass(frozen=True)
class Bounds:
    """Numbers that an option may have. A bound that is None does not limit."""

    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    finite: bool = False  # infinity is refused
    also: tuple[float, ...] = ()  # single numbers beyond the bounds that have a meaning of their own
    choices: tuple[str, ...] = ()  # the only texts that are allowed; empty: every text
    endings: tuple[str, ...] = ()  # a text ends in one of these; empty: in anything

    def allow(self, value: float | str) -> bool:
        """Return whether a number or a text is allowed. NaN is inside no bound."""
        if isinstance(value, str):
            return (not self.choices or value in self.choices) and (not self.endings or value.endswith(self.endings))
        if value in self.also:
            return True
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.maximum is None or value <= self.maximum)
            and (self.below is None or value < self.below)
            and (not self.finite or math.isfinite(value))
        )

    def describe(self) -> str:
        """Return the bounds in words, such as "at least 0 and below 1"; an empty text where nothing is limited."""
        words = (
            ("at least", self.minimum),
            ("above", self.above),
            ("at most", self.maximum),
            ("below", self.below),
        )
        limits = [f"{word} {bound:g}" for word, bound in words if bound is not None]
        limits += ["finite"] if self.finite else []
        limits += [" or ".join(self.choices)] if self.choices else []
        limits += [f"a text that ends in {' or '.join(self.endings)}"] if self.endings else []
        return " or ".join([" and ".join(limits), *(f"{value:g}" for value in self.also)])


@dataclass(frozen=True)
class Option:
    """Documentation of one field of the configuration."""

    text: str  # one sentence or noun phrase
    unit: str | None = None  # of a number; None for everything else
    bounds: Bounds = Bounds()
    resume: OnResume | None = None  # None: the rule of its section decides

    def describe(self) -> str:
        """Return the documentation with unit and bounds in brackets."""
        limits = [self.unit] if self.unit not in (None, PLAIN) else []
        limits += [self.bounds.describe()] if self.bounds.describe() else []
        return f"{self.text} [{', '.join(limits)}]" if limits else self.text


def option(
    default: Any,
    text: str,
    *,
    unit: str | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    finite: bool = False,
    also: tuple[float, ...] = (),
    choices: tuple[str, ...] = (),
    endings: tuple[str, ...] = (),
    resume: OnResume | None = None,
) -> Any:
    """Return the dataclass field of an option.

    Args:
        default: Value where the user gives none; ``omegaconf.MISSING`` for a mandatory option.
        text: Documentation, one sentence or noun phrase.
        unit: Unit of a number, or ``PLAIN``.
        minimum: Smallest number that is allowed. For a list, bounds apply to each item.
        above: Number that the value has to exceed.
        maximum: Largest number that is allowed.
        below: Number that the value has to stay below.
        finite: Whether infinity is refused; NaN is refused by every bound.
        also: Single numbers that are allowed beyond the bounds.
        choices: The only texts that are allowed.
        endings: Endings of which a text has one.
        resume: Rule for another value when a run resumes, or None where the rule of its section decides.
    """
    bounds = Bounds(minimum, above, maximum, below, finite, also, choices, endings)
    metadata = {_KEY: Option(text, unit, bounds, resume)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(section_class: type, text: str, *, resume: OnResume = OnResume.section) -> Any:
    """Return the dataclass field of a section that is there with its defaults where the user gives nothing.

    Args:
        section_class: Dataclass of the section.
        text: Documentation, one sentence or noun phrase.
        resume: Rule for other values when a run resumes.
    """
    return dataclasses.field(default_factory=section_class, metadata={_KEY: Option(text, resume=resume)})


def option_of(field: dataclasses.Field[Any]) -> Option:
    """Return the documentation of a field.

    Raises:
        KeyError: The field was declared without ``option`` or ``section``.
    """
    return field.metadata[_KEY]

"""Every option has documentation, a unit and bounds in its metadata; bounds are enforced and printed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from hetero_ppo.config import schema
from hetero_ppo.config.bounds import check_bounds
from hetero_ppo.config.field_types import item_class, section_class
from hetero_ppo.config.load import load_config
from hetero_ppo.config.render import render_yaml
from hetero_ppo.config.schema.option import PLAIN, Bounds, OnResume, Option, option_of

FRAGMENTS = ("of", "see", "as", "what")


def sections(section: type) -> Iterator[type]:
    """Yield a section and every section that lies in it."""
    yield section
    for hint in get_type_hints(section).values():
        inner = section_class(hint) or item_class(hint)
        if inner is not None:
            yield from sections(inner)


ALL_SECTIONS = sorted(
    {found for kind in schema.SCHEMAS.values() for found in sections(kind)}, key=lambda one: one.__name__
)


def options(section: type) -> Iterator[tuple[dataclasses.Field[Any], Any, Option]]:
    """Yield (field, type, documentation) of every field of a section, inherited ones included."""
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        yield field, hints[field.name], option_of(field)


def is_number(hint: Any) -> bool:
    plain = {hint, *get_args(hint)} - {type(None)}
    return any(one in (int, float) for one in plain)


@pytest.mark.parametrize("section", ALL_SECTIONS)
def test_every_field_has_documentation(section: type) -> None:
    assert section.__doc__ and not section.__doc__.startswith(section.__name__), "the class has no docstring"
    for field, _, option in options(section):
        first, *_ = option.text.split()
        assert first.lower() not in FRAGMENTS, f"{field.name}: {option.text!r} is a fragment"
        assert any(letter.isupper() or letter.isdigit() for letter in first), f"{field.name}: {option.text}"
        assert not option.text.endswith((".", ";", ",")), f"{field.name}: {option.text}"


@pytest.mark.parametrize("section", ALL_SECTIONS)
def test_every_number_has_a_unit_or_is_declared_plain(section: type) -> None:
    for field, hint, option in options(section):
        assert (option.unit is not None) == is_number(hint), f"{section.__name__}.{field.name}: unit {option.unit}"
        bounds = option.bounds
        of_texts = Bounds(choices=bounds.choices, endings=bounds.endings)
        assert is_number(hint) or bounds == of_texts, f"{section.__name__}.{field.name}: bounds of no number"


@pytest.mark.parametrize("section", ALL_SECTIONS)
def test_defaults_are_inside_their_bounds(section: type) -> None:
    for field, _, option in options(section):
        if isinstance(field.default, (int, float)):
            assert option.bounds.allow(field.default), f"{section.__name__}.{field.name}"


@pytest.mark.parametrize("section", ALL_SECTIONS)
def test_each_bound_is_enforced(section: type) -> None:
    """The nearest number on the wrong side of every bound, infinity, NaN and other texts are refused with what is allowed."""
    for field, hint, option in options(section):
        bounds = option.bounds
        beyond: list[Any] = [] if bounds.minimum is None else [bounds.minimum - 1e-6]
        beyond += [] if bounds.above is None else [bounds.above]
        beyond += [] if bounds.maximum is None else [bounds.maximum + 1e-6]
        beyond += [] if bounds.below is None else [bounds.below]
        beyond += [math.inf, -math.inf] if bounds.finite else []
        beyond += [math.nan] if beyond else []
        beyond += ["other"] if bounds.choices or bounds.endings else []
        for value in beyond:
            values = [value] if hint == list[int] else value
            config = section(**{field.name: values})
            with pytest.raises(ValueError) as refused:
                check_bounds(config)
            text = str(refused.value)
            assert text.startswith(f"{field.name}={values}: allowed: {bounds.describe()}") and option.text in text
            assert (", or null" in text.split("Meaning")[0]) == (type(None) in get_args(hint))


@pytest.mark.parametrize("kind", schema.SCHEMAS)
def test_every_option_has_one_rule_on_resume(kind: str) -> None:
    """It is in the option's own metadata, or in that of a section which decides for all its fields."""

    def check(section: type) -> None:
        for field, hint, option in options(section):
            inner = section_class(hint) or item_class(hint)
            assert option.resume not in (None, OnResume.newer), (
                f"{section.__name__}.{field.name}: option(..., resume=...)"
            )
            assert inner is not None or option.resume is not OnResume.section, f"{section.__name__}.{field.name}"
            if option.resume is OnResume.section:
                check(inner)

    check(schema.SCHEMAS[kind])


def test_bounds_in_words() -> None:
    assert Bounds().describe() == ""
    assert Bounds(minimum=0, below=1).describe() == "at least 0 and below 1"
    assert Bounds(above=0, maximum=1, finite=True).describe() == "above 0 and at most 1 and finite"
    assert Bounds(minimum=1, also=(-1,)).describe() == "at least 1 or -1"
    assert Bounds(minimum=1, also=(-1,)).allow(-1) and not Bounds(minimum=1, also=(-1,)).allow(0)
    assert Option("Longest prompt", "tokens", Bounds(minimum=1)).describe() == "Longest prompt [tokens, at least 1]"
    assert Option("Weight", PLAIN).describe() == "Weight"


def test_the_sections_of_optional_roles_and_lists_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    role = "{model: {path: m}}"
    file.write_text(
        f"kind: ppo\nrun: {{dir: r}}\ndata: {{train: a.jsonl}}\nactor: {role}\ncritic: {role}\nreference: {role}\n"
    )
    check_bounds(load_config(str(file), ["reward_models=[{model: {path: m}}]"]).config)
    for overrides, expected in (
        (["reward_models=[{model: {path: m}, parallel: {tensor: 0}}]"], r"reward_models\.0\.parallel\.tensor=0"),
        (["reward_model={model: {path: m}, re_encode: {max_tokens: 1}}"], r"reward_model\.re_encode\.max_tokens=1"),
    ):
        with pytest.raises(ValueError, match=expected):
            check_bounds(load_config(str(file), overrides).config)


def test_a_printed_configuration_documents_inherited_options_too(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("kind: rm\nrun: {dir: r}\ndata: {train: a.jsonl}\nreward: {model: {path: m}}\n")
    lines = render_yaml(load_config(str(file), [])).splitlines()
    assert all("  # " in line for line in lines)
    (size,) = [line for line in lines if line.startswith("  micro_batch_size:")]
    assert size.endswith("where micro_batch_tokens is null [sequences, at least 1]")
    (aligned,) = [line for line in lines if line.startswith("  aligned:")]
    assert "golden scores" in aligned, "the trained reward model has documentation of its own"

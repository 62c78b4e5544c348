"""Options that a section had in earlier versions and that its kind of run never used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hetero_ppo.config import schema
from hetero_ppo.config.field_types import hints_of, item_class, section_class

_SFT = "SFT reads conversations, or prompts with completions"
_PAIRS = "a reward model reads chosen and rejected answers"
_PROMPTS = "PPO reads prompts"
_TOGETHER = "data.max_sequence_tokens limits prompt and answer together"
_NO_GENERATOR = "the run has no generator"
_NO_HEAD = "only the critic of a PPO run and the model of a reward-model run initialise a scalar head"

#: (section, name of the option) -> why no run used it.
REMOVED: dict[tuple[type, str], str] = {
    **{(schema.SftDataConfig, name): _SFT for name in ("chosen_key", "rejected_key", "label_key", "metadata_key")},
    (schema.SftDataConfig, "max_prompt_tokens"): _TOGETHER,
    **{
        (schema.PreferenceDataConfig, name): _PAIRS
        for name in ("messages_key", "completion_key", "label_key", "metadata_key")
    },
    (schema.PreferenceDataConfig, "max_prompt_tokens"): _TOGETHER,
    **{(schema.PromptDataConfig, name): _PROMPTS for name in ("completion_key", "chosen_key", "rejected_key")},
    (schema.PromptDataConfig, "max_sequence_tokens"): (
        "data.max_prompt_tokens and rollout.sampling.max_tokens limit a sequence of PPO"
    ),
    **{(schema.MemoryConfig, name): _NO_GENERATOR for name in ("engine_graphs_mib", "engine_runtime_mib")},
    **{(schema.ModelConfig, name): _NO_HEAD for name in ("head_init", "init_seed")},
}


def removed_options(values: dict[Any, Any], section: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted field, why it is gone) of every removed option that is set.

    Args:
        values: Values as YAML has them, of the keys that the user gave. Overrides number the items of a list with keys.
        section: Class of these values.
        prefix: Dotted name of the section, with a dot at the end.
    """
    for name, value in values.items():
        field = f"{prefix}{name}"
        reason = REMOVED.get((section, name))
        if reason is not None:
            yield field, reason
        hint = hints_of(section).get(name)
        nested, item = section_class(hint), item_class(hint)
        if nested is not None and isinstance(value, dict):
            yield from removed_options(value, nested, f"{field}.")
        elif item is not None and isinstance(value, (list, dict)):
            for number, one in value.items() if isinstance(value, dict) else enumerate(value):
                if isinstance(one, dict):
                    yield from removed_options(one, item, f"{field}.{number}.")


def without_removed(values: dict[Any, Any], section: type) -> dict[Any, Any]:
    """Return the values that an earlier version saved, without the options that no run used.

    Args:
        values: Values as YAML has them.
        section: Class of these values.
    """
    kept: dict[Any, Any] = {}
    for name, value in values.items():
        if (section, name) in REMOVED:
            continue
        hint = hints_of(section).get(name)
        nested, item = section_class(hint), item_class(hint)
        if nested is not None and isinstance(value, dict):
            value = without_removed(value, nested)
        elif item is not None and isinstance(value, list):
            value = [without_removed(one, item) if isinstance(one, dict) else one for one in value]
        kept[name] = value
    return kept

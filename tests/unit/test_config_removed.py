"""Options that a kind of run never used are gone from its schema; old files still load, and every such line is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hetero_ppo.config import schema
from hetero_ppo.config.field_types import hints_of
from hetero_ppo.config.load import load_config
from hetero_ppo.config.removed import REMOVED
from hetero_ppo.config.unused import unused_options
from hetero_ppo.runtime.changes import compare, config_values

ROLE: dict[str, Any] = {"model": {"path": "m"}}
OLD_MODEL: dict[str, Any] = {"path": "m", "head_init": None, "init_seed": 1234}
DATA: dict[str, Any] = {"train": "a.jsonl"}
#: Keys of the data section that every kind of run had.
OLD_DATA = {
    "messages_key": "messages",
    "completion_key": "completion",
    "chosen_key": "chosen",
    "rejected_key": "rejected",
    "label_key": "label",
    "metadata_key": "metadata",
    "max_prompt_tokens": 512,
    "max_sequence_tokens": 1024,
}
ENGINE = {"engine_graphs_mib": 768.0, "engine_runtime_mib": 256.0}
OLD: dict[str, dict[str, Any]] = {
    "sft": {"actor": {"model": OLD_MODEL}},
    "rm": {"reward": {"model": OLD_MODEL}},
    "ppo": {
        **{role: {"model": OLD_MODEL} for role in ("actor", "critic", "reference")},
        "reward_models": [{"model": OLD_MODEL}, {"model": OLD_MODEL}],
    },
}


def write(folder: Path, values: dict[str, Any]) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return str(path)


def old_values(kind: str) -> dict[str, Any]:
    """Return what a version before the split saved: every kind of run had all options of the data and of the engine."""
    return {"kind": kind, "run": {"dir": "r"}, "data": {**DATA, **OLD_DATA}, **OLD[kind], "memory": dict(ENGINE)}


def new_values(kind: str) -> dict[str, Any]:
    roles: dict[str, Any] = {name: ROLE if name != "reward_models" else [ROLE, ROLE] for name in OLD[kind]}
    return {"kind": kind, "run": {"dir": "r"}, "data": DATA, **roles}


def test_no_removed_option_is_in_its_schema() -> None:
    assert not [(section, name) for section, name in REMOVED if name in hints_of(section)]


def test_removed_options_of_a_file_are_left_out_and_named_with_their_lines(tmp_path: Path) -> None:
    lines = unused_options(load_config(write(tmp_path, old_values("sft")), []))
    fields = [line.split(": ")[1].split(" ")[0] for line in lines]
    data = ("chosen_key", "rejected_key", "label_key", "metadata_key", "max_prompt_tokens")
    assert fields == [
        *(f"data.{name}" for name in data),
        *("actor.model.head_init", "actor.model.init_seed"),
        *("memory.engine_graphs_mib", "memory.engine_runtime_mib"),
    ]
    assert lines[0] == (
        f"{tmp_path}/config.yaml:8: data.chosen_key is no option of kind sft, remove it: "
        "SFT reads conversations, or prompts with completions"
    )


@pytest.mark.parametrize(
    ("kind", "override"),
    [
        ("rm", "data.messages_key=x"),
        ("rm", "data.max_prompt_tokens=9"),
        ("ppo", "data.max_sequence_tokens=9"),
        ("ppo", "data.completion_key=x"),
        ("ppo", "reward_models.1.model.init_seed=3"),
        ("ppo", "reward_model={model: {path: m, head_init: zero}}"),
    ],
)
def test_an_override_of_a_removed_option_is_refused(tmp_path: Path, kind: str, override: str) -> None:
    with pytest.raises(ValueError, match=r"override .* is no option of this kind of run, leave it out: "):
        load_config(write(tmp_path, new_values(kind)), [override])


def test_options_that_a_kind_uses_stay(tmp_path: Path) -> None:
    ppo = ["data.max_prompt_tokens=9", "critic.model.init_seed=3", "memory.engine_graphs_mib=1", "data.label_key=x"]
    load_config(write(tmp_path, new_values("ppo")), ppo)
    load_config(write(tmp_path, new_values("rm")), ["reward.model.head_init=zero", "data.max_sequence_tokens=9"])
    load_config(write(tmp_path, new_values("sft")), ["data.messages_key=x", "data.completion_key=y"])


@pytest.mark.parametrize("kind", schema.SCHEMAS)
def test_the_configuration_of_an_old_run_still_loads(tmp_path: Path, kind: str) -> None:
    old = load_config(write(tmp_path, old_values(kind)), [])
    assert old.config == load_config(write(tmp_path, new_values(kind)), []).config


@pytest.mark.parametrize("kind", schema.SCHEMAS)
def test_removed_options_are_no_change_at_a_resume(tmp_path: Path, kind: str) -> None:
    values = config_values(load_config(write(tmp_path, new_values(kind)), []))
    old = {**values, "data": {**OLD_DATA, **values["data"]}, "memory": {**ENGINE, **values["memory"]}}
    assert compare(old, values, kind) == []

"""YAML and overrides -> typed configuration; every mistake names its place and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from hetero_ppo.config.load import load_config, load_draft
from hetero_ppo.config.render import render_yaml, save_config
from hetero_ppo.config.schema import Dtype, LrSchedule, PpoConfig, SftConfig

SFT = """\
kind: sft
run:
  dir: ${oc.env:RUN_ROOT}/sft
data: {train: train.jsonl}
actor:
  model: {path: checkpoint}
  optimizer:
    lr: 1e-5
    lr_schedule: cosine
"""
PPO = """\
kind: ppo
run: {dir: run}
data: {train: train.jsonl}
actor: {model: {path: policy, dtype: bf16}}
critic: {model: {path: "${actor.model.path}"}}
reference: {model: {path: "${actor.model.path}"}}
"""


@pytest.fixture
def sft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RUN_ROOT", "runs")
    return write(tmp_path, SFT)


@pytest.fixture
def ppo(tmp_path: Path) -> str:
    return write(tmp_path, PPO)


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def message(path: str, *overrides: str) -> str:
    with pytest.raises(ValueError) as error:
        load_config(path, list(overrides))
    return str(error.value)


def test_values_are_typed_and_interpolated(sft: str, ppo: str) -> None:
    loaded = load_config(ppo, ["rollout.sampling.stop_token_ids=[1, 2]", "rollout.dtype=fp32"])
    assert isinstance(loaded.config, PpoConfig)
    assert loaded.kind == "ppo"
    assert loaded.config.actor.model.dtype is Dtype.bf16
    assert loaded.config.reference.model.path == "policy"
    assert loaded.config.rollout.sampling.stop_token_ids == [1, 2]
    assert loaded.config.rollout.dtype is Dtype.fp32


def test_the_environment_is_read_and_later_overrides_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_ROOT", "runs")
    config = load_config(write(tmp_path, SFT), ["actor.optimizer.lr=2e-4", "actor.optimizer.lr=3e-4"]).config
    assert isinstance(config, SftConfig)
    assert config.run.dir == "runs/sft"
    assert config.actor.optimizer.lr == 3e-4
    assert config.actor.optimizer.lr_schedule is LrSchedule.cosine


def test_an_optional_section_opens_with_its_defaults_and_closes_again(ppo: str) -> None:
    assert load_config(ppo, []).config.reward_model is None
    opened = load_config(ppo, ["reward_model.model.path=scorer"]).config
    assert opened.reward_model.model.path == "scorer"
    assert opened.reward_model.micro_batch_size == 8
    assert load_config(ppo, ["reward_model.model.path=scorer", "reward_model=null"]).config.reward_model is None
    assert "mandatory field not given: reward_model.model.path" in message(ppo, "reward_model.micro_batch_size=2")


ENSEMBLE = (
    PPO
    + """\
reward_models:
  - model: {path: a}
    parallel: {tensor: 2}
  - {model: {path: "${actor.model.path}", dtype: bf16}}
"""
)


def test_a_list_of_sections(tmp_path: Path) -> None:
    path = write(tmp_path, ENSEMBLE)
    loaded = load_config(path, ["reward_models.1.micro_batch_size=3", "reward_models.2.model.path=c"])
    first, second, third = loaded.config.reward_models
    assert (first.model.path, first.parallel.tensor, first.micro_batch_size) == ("a", 2, 8)
    assert (second.model.path, second.model.dtype, second.micro_batch_size) == ("policy", Dtype.bf16, 3)
    assert third.model.path == "c"
    save_config(loaded, str(tmp_path / "saved.yaml"))
    assert load_config(str(tmp_path / "saved.yaml"), []).config == loaded.config
    assert load_config(path, ["reward_models=[]"]).config.reward_models == []
    one = load_config(path, ["reward_models=[{model: {path: z}}]"]).config.reward_models
    assert [role.model.path for role in one] == ["z"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("reward_models.4.model.path=c", "reward_models.4.model.path: the list has 2 items, the next one is number 2"),
        ("reward_models.0.modle.path=c", "unknown key 'reward_models.0.modle'; did you mean 'reward_models.0.model'?"),
        ("reward_models.x.model.path=c", "reward_models.x: items of the list reward_models are numbered from 0"),
        ("reward_models=3", "allowed: a list of sections with the keys model, parallel"),
        ("reward_models=[3]", "reward_models.0 is a section with the keys model, parallel"),
        (
            "reward_models.0.model.dtype=x",
            "reward_models.0.model.dtype: 'x' is not allowed; allowed: one of fp32, bf16",
        ),
    ],
)
def test_a_wrong_item_is_named(tmp_path: Path, override: str, expected: str) -> None:
    text = message(write(tmp_path, ENSEMBLE), override)
    assert expected in text and f"override {override!r}" in text


def test_a_wrong_line_of_an_item_is_named(tmp_path: Path) -> None:
    assert "run.yaml:9: unknown key 'reward_models.0.paralel'" in message(
        write(tmp_path, ENSEMBLE.replace("parallel", "paralel"))
    )
    lacking = write(tmp_path, ENSEMBLE.replace("path: a", "dtype: fp32"))
    assert "mandatory field not given: reward_models.0.model.path" in message(lacking)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("actor.optimzer.lr=3", "unknown key 'actor.optimzer'; did you mean 'actor.optimizer'?"),
        ("train.lr=3", "unknown key 'train.lr'; did you mean 'actor.optimizer.lr'?"),
        ("actor.zzz=3", "known keys under actor: model, parallel"),
        ("actor=3", "actor is a section with the keys model, parallel"),
        ("actor.optimizer.lr={a: 1}", "actor.optimizer.lr takes one value (a number)"),
        ("actor.optimizer.lr=fast", "'fast' is not allowed; allowed: a number"),
        ("actor.optimizer.lr=null", "None is not allowed; allowed: a number"),
        ("actor.micro_batch_size=0.5", "0.5 is not allowed; allowed: an integer"),
        ("actor.model.dtype=fp64", "'fp64' is not allowed; allowed: one of fp32, bf16"),
        ("data.shuffle=3", "3 is not allowed; allowed: true or false"),
        ("actor.recompute=true", "True is not allowed; allowed: text, or null"),
        ("run.dir=${oc.env:NOT_SET_ANYWHERE}", "run.dir cannot be resolved: "),
        ("run.dir=${run.nope}", "run.dir cannot be resolved: "),
        ("run.dir=${data.eval_file}", "run.dir cannot be resolved: "),
        ("run.dir=${", "is not a YAML value"),
        ("kind=ppo", "kind chooses the schema"),
        ("--run.dir=x", "overrides look like a.b=c"),
        ("run.dir", "overrides look like a.b=c"),
    ],
)
def test_a_wrong_override_is_named(sft: str, override: str, expected: str) -> None:
    text = message(sft, override)
    assert expected in text
    assert f"override {override!r}" in text


def test_a_wrong_line_of_the_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_ROOT", "runs")
    assert "run.yaml:8: actor.optimizer.lr: 'fast'" in message(write(tmp_path, SFT.replace("1e-5", "fast")))
    misspelt = write(tmp_path, SFT.replace("lr_schedule", "lr_shedule"))
    assert "run.yaml:9: unknown key 'actor.optimizer.lr_shedule'; did you mean" in message(misspelt)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kind: sft\nrun: [", "not valid YAML"),
        ("kind: sft\nrun: {dir: a}\nrun: {dir: b}", "not valid YAML: .*duplicate key"),
        ("- 1\n", "the top level has to be a mapping"),
        ("", "the top level has to be a mapping"),
        ("run: {dir: a}", "no `kind`"),
        ("kind: dpo", "kind is 'dpo'; allowed: sft, rm, ppo"),
        ("kind: sft", "mandatory fields not given: actor.model.path, data.train, run.dir"),
        ("kind: sft\nrun: {dir: '???'}", "run.dir"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        load_config(write(tmp_path, text), [])


def test_no_file() -> None:
    with pytest.raises(FileNotFoundError, match="'nowhere.yaml' does not exist"):
        load_config("nowhere.yaml", [])


def test_a_draft_may_lack_fields(tmp_path: Path) -> None:
    draft = load_draft(write(tmp_path, "kind: sft\nrun: {dir: a}"), [])
    assert draft.missing_fields() == ["actor.model.path", "data.train"]
    assert "path: ???" in render_yaml(draft)


def test_saved_configurations_read_back_the_same(ppo: str, tmp_path: Path) -> None:
    loaded = load_config(ppo, ["reward_model.model.path='007'", "data.prompt_key='true'", "actor.optimizer.eps=1e-12"])
    saved = tmp_path / "below" / "saved.yaml"
    save_config(loaded, str(saved))
    assert load_config(str(saved), []).config == loaded.config

"""Options that a run ignores are printed; paths of the shell are replaced or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from hetero_ppo.config import schema
from hetero_ppo.config.load import all_fields, load_config
from hetero_ppo.config.paths import PATH_FIELDS
from hetero_ppo.config.render import render_yaml
from hetero_ppo.config.unused import BY_KIND, COMMON_OPTIONS, unused_options

ROLE = "{model: {path: m}}"
YAML = {
    "sft": f"kind: sft\nrun: {{dir: r}}\ndata: {{train: a.jsonl}}\nactor: {ROLE}\n",
    "rm": f"kind: rm\nrun: {{dir: r}}\ndata: {{train: a.jsonl}}\nreward: {ROLE}\n",
    "ppo": f"kind: ppo\nrun: {{dir: r}}\ndata: {{train: a.jsonl}}\nactor: {ROLE}\ncritic: {ROLE}\nreference: {ROLE}\n",
}


def lines(tmp_path: Path, kind: str, *overrides: str) -> list[str]:
    file = tmp_path / "c.yaml"
    file.write_text(YAML[kind])
    return unused_options(load_config(str(file), list(overrides)))


@pytest.mark.parametrize(
    ("kind", "override", "reason"),
    [
        ("sft", "actor.optimizer.min_lr=1e-06", "actor.optimizer.lr_schedule is constant"),
        ("sft", "train.eval_batches=3", "there is no data.eval"),
        ("ppo", "reward.golden_every=3", "there is no reward model"),
        ("ppo", "reward.on_error=exclude", "there is no reward.function"),
        ("ppo", "reward.timeout_s=3.0", "there is neither reward.function"),
        ("ppo", "algorithm.truncation_score=-2.0", "algorithm.truncated is not penalise"),
        ("ppo", "algorithm.kl.target=3.0", "algorithm.kl.controller is fixed"),
        ("ppo", "algorithm.kl.loss_estimator=k2", "algorithm.kl.loss_coef is 0"),
        ("ppo", "algorithm.rollout_correction.cap=3.0", "algorithm.rollout_correction.kind is none"),
        ("ppo", "pipeline.sweep_s=3.0", "pipeline.chunk_size is not 0"),
        ("ppo", "critic.optimizer.min_lr=1e-06", "critic.optimizer.lr_schedule is constant"),
    ],
)
def test_an_option_that_is_not_used_is_printed_where_it_was_set(
    tmp_path: Path, kind: str, override: str, reason: str
) -> None:
    assert lines(tmp_path, kind) == []
    (line,) = lines(tmp_path, kind, override)
    assert line.startswith(f"{override} is not used: ") and reason in line


@pytest.mark.parametrize(
    ("override", "condition"),
    [
        ("train.epochs=3", "train.steps=4"),
        ("actor.micro_batch_size=3", "actor.micro_batch_tokens=99"),
        ("rollout.kv_cache_mib=3", "rollout.engine=megatron"),
        ("pipeline.overlap=false", "rollout.engine=megatron"),
        ("rollout.max_num_seqs=3", "train.replay_rollouts=old"),
        ("data.eval=b.jsonl", "train.replay_rollouts=old"),
        ("rollout.mismatch.patience=3", "algorithm.old_log_probs=rollout"),
        ("rollout.verify_sync_tolerance=0.1", "rollout.verify_sync=false"),
        ("residency.overlap=false", "residency.offload=false"),
        ("algorithm.lam=0.9", "critic=null"),
    ],
)
def test_an_option_may_be_unused_because_of_another(tmp_path: Path, override: str, condition: str) -> None:
    assert lines(tmp_path, "ppo", override) == []
    (line,) = lines(tmp_path, "ppo", override, condition)
    assert line.lower().startswith(f"{override} is not used: ")


@pytest.mark.parametrize(
    ("override", "condition"),
    [
        ("algorithm.kl.target=3.0", "algorithm.kl.controller=adaptive"),
        ("algorithm.kl.loss_estimator=k2", "algorithm.kl.loss_coef=0.1"),
        ("algorithm.truncation_score=-2.0", "algorithm.truncated=penalise"),
        ("reward.on_error=exclude", "reward.function=a:b"),
        ("reward.golden_every=3", "reward_model.model.path=m"),
        ("actor.optimizer.min_lr=1e-06", "actor.optimizer.lr_schedule=cosine"),
    ],
)
def test_an_option_that_is_used_is_not_printed(tmp_path: Path, override: str, condition: str) -> None:
    assert lines(tmp_path, "ppo", override, condition) == []


def test_what_a_run_has_saved_of_its_defaults_is_not_printed(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(YAML["ppo"] + "reward_models: [{model: {path: m}}, {model: {path: m}, micro_batch_tokens: 9}]\n")
    saved = tmp_path / "saved.yaml"
    saved.write_text(render_yaml(load_config(str(file), [])))
    assert unused_options(load_config(str(saved), [])) == []
    (line,) = unused_options(load_config(str(saved), ["reward_models.1.micro_batch_size=3"]))
    assert line.startswith("reward_models.1.micro_batch_size=3 is not used: reward_models.1.micro_batch_tokens")


def test_every_field_of_the_tables_is_an_option() -> None:
    for kind, options in BY_KIND.items():
        known = set(all_fields(kind))
        assert {field for entry in (*COMMON_OPTIONS, *options) for field in entry.fields} <= known
    known = {field for kind in schema.SCHEMAS.values() for field in all_fields(kind)} | {"re_encode.chat_template"}
    assert all(any(field == name or field.endswith(f".{name}") for field in known) for name in PATH_FIELDS)


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    file = tmp_path / "c.yaml"
    file.write_text(YAML["ppo"])
    paths = {
        "run.dir": "run",
        "data.train": "a.jsonl",
        "data.eval": "b.jsonl",
        "data.chat_template": "t.jinja",
        "actor.model.path": "m",
        "critic.model.tokenizer": "t",
        "reward_models.1.model.path": "m",
        "reward_models.0.re_encode.chat_template": "t",
        "checkpoint.load": "old",
        "train.replay_rollouts": "old",
        "reward.function": "f.py:score",
        "train.eval_function": "f.py:score",
    }
    sections = ["reward_models=[{model: {path: m}}, {model: {path: m}}]", "reward_models.0.re_encode.max_tokens=9"]
    loaded = load_config(str(file), [*sections, *(f"{field}=~/{value}" for field, value in paths.items())])
    for field, value in paths.items():
        found: object = loaded.config
        for name in field.split("."):
            found = found[int(name)] if isinstance(found, list) else vars(found)[name]
        assert found == f"/home/me/{value}", field
    with pytest.raises(ValueError, match=r"data\.train=~nobody_here/a\.jsonl: there is no such home folder"):
        load_config(str(file), ["data.train=~nobody_here/a.jsonl"])


@pytest.mark.parametrize("value", ["$HOME/a.jsonl", "data/$USER.jsonl"])
def test_shell_variables_in_paths_are_refused(tmp_path: Path, value: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(YAML["sft"].replace("a.jsonl", value))
    with pytest.raises(ValueError, match=r"data\.train=.*: shell variables are not replaced .* \$\{oc\.env:NAME\}"):
        load_config(str(file), [])

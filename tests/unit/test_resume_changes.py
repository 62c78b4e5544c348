"""A run that resumes with a configuration or inputs that differ from the checkpoint's refuses them or says so."""

from __future__ import annotations

import copy
import functools
import json
import operator
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_type_hints

import pytest
from tests.helpers.one_rank import ONE_RANK

from hetero_ppo.checkpoint.manifest import COMPLETE, share_digests, write_marker
from hetero_ppo.config import schema
from hetero_ppo.config.checks_resume import check_allowed_changes
from hetero_ppo.config.field_types import item_class, section_class
from hetero_ppo.config.load import LoadedConfig, load_config
from hetero_ppo.config.on_resume import rule_of
from hetero_ppo.config.render import save_config
from hetero_ppo.config.schema.option import OnResume
from hetero_ppo.runtime.changes import ConfigChange, compare, config_values
from hetero_ppo.runtime.inputs import Input, check_inputs, function_digest
from hetero_ppo.runtime.resume import DIGESTS_VERSION, Resume, beginning, check_changes, read_resume
from hetero_ppo.trainers.run import Run

ROLE = {"model": {"path": "model"}}
CONFIGS: dict[str, dict[str, Any]] = {
    "sft": {"actor": ROLE},
    "rm": {"reward": ROLE},
    "ppo": {"actor": ROLE, "critic": ROLE, "reference": ROLE, "reward_model": {**ROLE, "re_encode": {"max_tokens": 8}}},
}


def configured(tmp_path: Path, kind: str, *overrides: str) -> LoadedConfig:
    file = tmp_path / f"{kind}.yaml"
    values = {"kind": kind, "run": {"dir": str(tmp_path / "run")}, "data": {"train": "a.jsonl"}, **CONFIGS[kind]}
    file.write_text(json.dumps(values))
    return load_config(str(file), list(overrides))


def save_checkpoint(loaded: LoadedConfig, step: int = 2, **state: Any) -> Path:
    """Save the parts of a checkpoint of this configuration that these tests read."""
    run_dir = Path(loaded.config.run.dir)
    folder = run_dir / "checkpoints" / f"iter_{step:07d}"
    folder.mkdir(parents=True)
    save_config(loaded, str(folder / "config.yaml"))
    about = {
        "step": step,
        "run_id": "a",
        "begun": "2024-02-29T23:59:59",
        "inputs": {"a": "b"},
        "digests_version": DIGESTS_VERSION,
    }
    (folder / "trainer.json").write_text(json.dumps(about | state))
    mark(folder)
    return run_dir


def mark(folder: Path) -> None:
    (folder / COMPLETE).unlink(missing_ok=True)
    write_marker(folder, share_digests(folder, 0, 1, fsync=False))


def fields_of(section: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all fields below a section; the item of a list is number 0."""
    for name, hint in get_type_hints(section).items():
        inner, item = section_class(hint), item_class(hint)
        if inner is not None:
            yield from fields_of(inner, f"{prefix}{name}.")
        elif item is not None:
            yield from fields_of(item, f"{prefix}{name}.0.")
        else:
            yield f"{prefix}{name}"


def other_value(value: Any) -> Any:
    """Return another value of the same kind; it need not be one of an enum's."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [*value, 7]
    return value + 1 if isinstance(value, (int, float)) else f"{value}_other"


@functools.cache
def values_of(kind: str) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        return config_values(configured(Path(folder), kind))


def all_changed(values: Any) -> Any:
    """Return a configuration in which every field has another value."""
    if isinstance(values, dict):
        return {
            name: value if value == [] and name == "reward_models" else all_changed(value)
            for name, value in values.items()
        }
    if isinstance(values, list) and values and isinstance(values[0], dict):
        return [all_changed(value) for value in values]
    return other_value(values)


@pytest.mark.parametrize("kind", schema.SCHEMAS)
def test_a_change_of_any_field_does_what_its_rule_says(kind: str) -> None:
    section = schema.SCHEMAS[kind]
    found = {change.field: change for change in compare(all_changed(values_of(kind)), values_of(kind), kind)}
    expected = {
        field: rule_of(section, field) for field in fields_of(section) if not field.startswith("reward_models.")
    }
    assert set(found) == {field for field, rule in expected.items() if rule is not OnResume.start}
    for field, change in found.items():
        assert change.rule is expected[field], field
        check_change(change)


def check_change(change: ConfigChange) -> None:
    """Assert that a change is refused or printed by its rule, and allowed by its name and by its section's."""
    refused = change.rule in (OnResume.objective, OnResume.form)
    with pytest.raises(ValueError, match=rf"checkpoint\.load: .*{change.field}: .* -> ") if refused else nullcontext():
        check_changes(resumed({}, changes=[change]))
    if change.rule is OnResume.form:
        with pytest.raises(ValueError, match="stored in another form"):
            check_changes(resumed({}, change.field, changes=[change]))
        return
    for name in {change.field, change.field.rpartition(".")[0] or change.field}:
        resume = resumed({}, name, changes=[change])
        check_changes(resume)
        becomes = "allowed by checkpoint.allow_changes" if refused else change.rule.value
        assert f"  {change.field}: " in resume.describe() and f"({becomes})" in resume.describe()


def test_nothing_changed_is_said(tmp_path: Path) -> None:
    loaded = configured(tmp_path, "ppo")
    run_dir = save_checkpoint(loaded)
    resume = read_resume(configured(tmp_path, "ppo", f"checkpoint.load={run_dir}", "run.dir=elsewhere"))
    assert resume is not None and resume.describe() == f"the configuration is that of {resume.folder}"


@pytest.mark.parametrize("lacks", ["checkpoint", "run"])
@pytest.mark.parametrize("field", ["reward_model", "reward_model.re_encode", "reward_models.0"])
def test_a_section_that_one_configuration_lacks_is_one_change(field: str, lacks: str) -> None:
    there = copy.deepcopy(values_of("ppo"))
    there["reward_models"] = [copy.deepcopy(there["reward_model"])]
    lacking = copy.deepcopy(there)
    if field == "reward_models.0":
        lacking["reward_models"] = []
    else:
        *path, name = field.split(".")
        functools.reduce(operator.getitem, path, lacking)[name] = None
    old, new = (lacking, there) if lacks == "checkpoint" else (there, lacking)
    assert [(change.field, change.rule) for change in compare(old, new, "ppo")] == [(field, OnResume.objective)]


def test_options_that_are_newer_than_the_checkpoint() -> None:
    """With their defaults they are not refused; a value of its own is a change. An option that is gone is named."""
    values = values_of("ppo")
    old = copy.deepcopy(values)
    del old["algorithm"]["entropy_coef"], old["rollout"]["mismatch"]
    old["algorithm"]["gone"] = 3
    first, last = compare(old, values, "ppo")
    assert (
        first.describe()
        == "algorithm.entropy_coef: (not there) -> 0.0 (newer than the checkpoint, with its default; applied)"
    )
    assert last.describe() == "algorithm.gone: 3 -> (not there) (no longer an option)"
    check_changes(resumed({}, changes=[first, last]))
    changes = compare(old, {**values, "algorithm": {**values["algorithm"], "entropy_coef": 0.1}}, "ppo")
    assert changes[0].values() == "algorithm.entropy_coef: (not there) -> 0.1"


def test_a_checkpoint_without_a_configuration_falls_back_on_its_run_folder(tmp_path: Path) -> None:
    loaded = configured(tmp_path, "sft")
    run_dir = save_checkpoint(loaded)
    (run_dir / "checkpoints" / "iter_0000002" / "config.yaml").unlink()
    mark(run_dir / "checkpoints" / "iter_0000002")
    after = configured(tmp_path, "sft", f"checkpoint.load={run_dir}", "run.log_every=9")
    resume = read_resume(after)
    assert resume is not None and "cannot be compared" in resume.describe()
    save_config(loaded, str(run_dir / "config.yaml"))
    resume = read_resume(after)
    assert resume is not None and "run.log_every: 1 -> 9" in resume.describe()


def test_another_kind_of_run_is_refused(tmp_path: Path) -> None:
    run_dir = save_checkpoint(configured(tmp_path, "sft"))
    with pytest.raises(ValueError, match="is of a run of kind 'sft', this one is of kind 'rm'"):
        read_resume(configured(tmp_path, "rm", f"checkpoint.load={run_dir}"))


def test_later_checkpoints_of_another_run_are_not_taken_for_newer_ones(tmp_path: Path) -> None:
    loaded = configured(tmp_path, "sft")
    run_dir = save_checkpoint(loaded)
    save_checkpoint(loaded, step=4, run_id="b")
    first = [f"checkpoint.load={run_dir}", "checkpoint.step=2"]
    with pytest.raises(ValueError, match="later checkpoints of another run than iter_0000002: iter_0000004"):
        read_resume(configured(tmp_path, "sft", *first))
    elsewhere = read_resume(configured(tmp_path, "sft", *first, f"run.dir={tmp_path / 'elsewhere'}"))
    assert elsewhere is not None and beginning(elsewhere).run_id not in ("a", "b")


def test_a_run_keeps_its_name_and_its_date(tmp_path: Path) -> None:
    run_dir = save_checkpoint(configured(tmp_path, "sft"))
    resume = read_resume(configured(tmp_path, "sft", f"checkpoint.load={run_dir}"))
    found = beginning(resume)
    assert (found.run_id, found.started_at) == ("a", datetime(2024, 2, 29, 23, 59, 59))
    assert resume is not None and resume.inputs == {"a": "b"}
    assert beginning(None).run_id != beginning(None).run_id
    assert abs((beginning(None).started_at - datetime.now()).total_seconds()) < 60


def test_a_checkpoint_of_an_older_version_has_no_name_and_no_date(tmp_path: Path) -> None:
    run_dir = save_checkpoint(configured(tmp_path, "sft"))
    folder = run_dir / "checkpoints" / "iter_0000002"
    (folder / "trainer.json").write_text('{"step": 2}')
    mark(folder)
    resume = read_resume(configured(tmp_path, "sft", f"checkpoint.load={run_dir}"))
    assert resume is not None and resume.inputs is None and beginning(resume).run_id == "unnamed"


def test_an_objective_changes_where_that_is_allowed(tmp_path: Path) -> None:
    run_dir = save_checkpoint(configured(tmp_path, "sft"))
    load = (f"checkpoint.load={run_dir}", "run.seed=7")
    with pytest.raises(ValueError, match=r"another objective .*run.seed.*checkpoint.allow_changes=\[run.seed\]"):
        read_resume(configured(tmp_path, "sft", *load))
    resume = read_resume(configured(tmp_path, "sft", *load, "checkpoint.allow_changes=[run.seed]"))
    assert resume is not None and resume.allowed == ["run.seed"]


def test_digests_that_another_version_made_are_not_compared(tmp_path: Path) -> None:
    run_dir = save_checkpoint(configured(tmp_path, "sft"), digests_version=DIGESTS_VERSION + 1)
    resume = read_resume(configured(tmp_path, "sft", f"checkpoint.load={run_dir}"))
    assert resume is not None and resume.inputs is None


def resumed(inputs: dict[str, str] | None, *allowed: str, changes: Sequence[ConfigChange] = ()) -> Resume:
    return Resume(Path("checkpoint"), 2, "a", True, None, inputs, list(changes), list(allowed))


def test_inputs_are_compared_by_content(tmp_path: Path) -> None:
    inputs = [
        Input("reference.model.path", "new", ("reference.model.path",)),
        Input("data.train", "same", ("data.train",)),
    ]
    old = {"reference.model.path": "old", "data.train": "same"}
    assert check_inputs(None, inputs) == []
    with pytest.raises(
        ValueError, match=r"content of reference.model.path is not .*allow_changes=\[reference.model.path\]"
    ):
        check_inputs(resumed(old), inputs)
    for name in ("reference.model.path", "reference.model", "reference"):
        (line,) = check_inputs(resumed(old, name), inputs)
        assert "the content of reference.model.path is not the checkpoint's" in line
    (line,) = check_inputs(resumed({"data.train": "same"}), inputs)
    assert "Not compared: reference.model.path" in line
    (line,) = check_inputs(resumed(None), inputs)
    assert "Not compared: reference.model.path, data.train" in line


def test_a_reward_function_may_move_and_not_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "a.py", tmp_path / "b.py"
    first.write_text("def score(prompt, response):\n    return 1.0\n")
    second.write_text("# moved\n\ndef score(prompt,\n          response):\n    return 1.0  # still\n")
    assert function_digest(f"{first}:score") == function_digest(f"{second}:score") != function_digest(f"{first}:other")
    second.write_text(second.read_text().replace("1.0", "2.0"))
    assert function_digest(f"{first}:score") != function_digest(f"{second}:score")
    package = tmp_path / "rewards_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('not imported here')\n")
    shutil.copy(first, package / "length.py")
    monkeypatch.syspath_prepend(tmp_path)
    assert function_digest("rewards_of_a_test.length:score") == function_digest(f"{first}:score")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("algorithm.gama", "there is no such field"),
        ("actor.model.paths", "there is no such field"),
        ("actor.optimizer.distributed", "cannot be another one"),
        ("run.dir", "belongs to each start"),
    ],
)
def test_a_name_that_cannot_be_allowed_is_refused(name: str, message: str) -> None:
    checkpoint = schema.CheckpointConfig(allow_changes=["algorithm", name])
    with pytest.raises(ValueError, match=f"checkpoint.allow_changes={name}: .*{message}"):
        check_allowed_changes(checkpoint, schema.PpoConfig)


def test_a_checkpoint_notes_which_open_roles_were_aligned(tmp_path: Path) -> None:
    run_dir = save_checkpoint(configured(tmp_path, "ppo"), aligned={"reward_model": True})
    resume = read_resume(configured(tmp_path, "ppo", f"checkpoint.load={run_dir}"))
    assert resume is not None and resume.aligned == {"reward_model": True}
    nothing = functools.partial(Run, tmp_path, ONE_RANK, None, None, beginning(None), None)
    assert nothing(aligned={"reward_model": False}).about["aligned"] == {"reward_model": False}

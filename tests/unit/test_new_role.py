"""A new role costs edits in three files: its section of the configuration, its entry in ``step/roles.py``, its phase in ``step/phases.py``.

The test edits a copy of the package, imports the copy in place of the package, and asks every reader of roles and phases for the new
ones. Two roles are added: a second reference, which is frozen, and a second critic, which is trained.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from importlib import import_module, invalidate_caches
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
MODEL = "{model: {path: examples/memory/qwen3_8b, dtype: bf16}}"

#: File -> a line that is in it once, and the lines that follow it in the copy.
EDITS = {
    "config/schema/kinds.py": [
        '    reference: RoleConfig = section(RoleConfig, "Frozen policy that the KL penalty is measured from")',
        '    anchor: RoleConfig = section(RoleConfig, "Second frozen policy")',
        '    twin: TrainedRoleConfig = section(TrainedRoleConfig, "Second value model")',
    ],
    "step/roles.py": [
        '    REFERENCE: RoleSection("lm", False, 2),',
        '    "anchor": RoleSection("lm", False, 2),',
        '    "twin": RoleSection("value", True, 1),',
    ],
    "step/phases.py": [
        '    phases.append(forward_phase("ref_log_probs", REFERENCE, overlap=overlap))',
        '    phases.append(forward_phase("anchor_log_probs", "anchor", overlap=overlap))',
        '    phases.append(forward_phase("twin_values", "twin", overlap=overlap))',
        '    phases.append(training_phase("twin", ["twin_values"]))',
    ],
}


@pytest.fixture
def edited_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Import ``hetero_ppo`` from an edited copy while a test runs."""
    monkeypatch.chdir(ROOT)  # the model folders of the example are relative to it
    shutil.copytree(ROOT / "hetero_ppo", tmp_path / "hetero_ppo", ignore=shutil.ignore_patterns("__pycache__"))
    for name, lines in EDITS.items():
        file = tmp_path / "hetero_ppo" / name
        text = file.read_text()
        assert text.count(f"{lines[0]}\n") == 1, f"{name} has changed: {lines[0]!r}"
        file.write_text(text.replace(lines[0], "\n".join(lines)))
    package = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "hetero_ppo"}
    for name in package:
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "hetero_ppo"]:
        del sys.modules[name]
    sys.modules.update(package)


def test_a_new_role_is_three_files(tmp_path: Path, edited_package: None) -> None:
    assert len(EDITS) == 3
    path = tmp_path / "run.yaml"
    path.write_text((ROOT / "examples/memory/qwen3_8b.yaml").read_text() + f"anchor: {MODEL}\ntwin: {MODEL}\n")
    config = import_module("hetero_ppo.config.load").load_config(str(path), []).config
    assert Path(sys.modules["hetero_ppo"].__file__ or "").is_relative_to(tmp_path)

    roles = import_module("hetero_ppo.step.roles").run_roles(config)
    assert list(roles) == ["actor", "critic", "reference", "anchor", "twin", "reward_model"]
    step = import_module("hetero_ppo.step.phases")
    phases = step.step_phases(config)
    step.check_order(phases)
    own = ["anchor_log_probs", "twin_values", "train_twin"]
    names = [phase.name for phase in phases]
    assert [name for name in names if name in own] == own

    plan = import_module("hetero_ppo.memory.plan").plan_memory(config, 8, device_bytes=80 * 2**30)
    assert [role.name for role in plan.roles] == list(roles) and [phase.phase for phase in plan.phases] == names
    held = {phase.phase: phase.roles for phase in plan.phases}
    assert [list(held[name]) for name in own] == [["anchor"], ["twin"], ["twin"]]
    assert len(held["train_twin"]["twin"]) == 4 and {"anchor", "twin"} <= plan.host.pinned.keys()

    device = import_module("hetero_ppo.engines.shared_device").SharedDevice(config.residency, phases)
    assert [phase.name for phase in device.schedule] == names
    lanes = import_module("hetero_ppo.observability.trace").LANES
    colours = import_module("hetero_ppo.observability.gantt").LANE_COLOURS
    assert {"anchor", "twin"} <= set(lanes) and {"anchor", "twin"} <= colours.keys()

    trained = ["actor", "critic", "twin"]  # what a checkpoint has a folder of, and what can be exported
    assert list(import_module("hetero_ppo.trainers.export").trained_specs(config)) == trained
    assert list(import_module("hetero_ppo.config.derived").derive_ppo(config, 8, 1000).roles) == trained

    engines = {name: SimpleNamespace(role=name, head=spec.head) for name, spec in roles.items()}
    scorers = import_module("hetero_ppo.experience.scorers").Scorers([engines["reward_model"]], None, config.reward)
    maker = import_module("hetero_ppo.experience.stages").ExperienceMaker(
        engines=engines,
        phases=phases,
        scorers=scorers,
        estimator=None,
        algorithm=config.algorithm,
        reward_config=config.reward,
        temperature=1.0,
        kl_controller=None,
        score_moments=None,
    )
    stages = {stage.name: stage for stage in maker.stages()}
    assert list(stages) == ["scores", "ref_log_probs", "anchor_log_probs", "twin_values", "old_log_probs", "values"]
    assert [stages[name].role.role for name in own[:2]] == ["anchor", "twin"]
    assert [stages[name].compute.func.__name__ for name in own[:2]] == ["policy_log_probs", "state_values"]

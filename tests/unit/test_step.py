"""Roles and phases of a step: one list, which memory plan, trace, residency, report and export read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from hetero_ppo.config.derived import PpoBatching, derive_ppo, derive_supervised
from hetero_ppo.config.load import load_config
from hetero_ppo.config.schema import SCHEMAS, PpoConfig, ResidencyConfig, RoleConfig, TrainedRoleConfig
from hetero_ppo.observability.gantt import LANE_COLOURS
from hetero_ppo.observability.trace import LANES
from hetero_ppo.step.kinds import FORWARD, TRAINING
from hetero_ppo.step.phases import GeneratorMemory, Phase, check_order, ppo_phases, step_phases, training_phase
from hetero_ppo.step.placement import run_placement
from hetero_ppo.step.roles import ROLE_SECTIONS, run_roles

ROOT = Path(__file__).parents[2]


def test_the_phases_of_a_ppo_step() -> None:
    phases = ppo_phases(reward_models=["reward_model"], actor_scores_old=True, overlap=True)
    assert [(phase.name, phase.role) for phase in phases] == [
        ("rollout", None),
        ("scores", "reward_model"),
        ("ref_log_probs", "reference"),
        ("old_log_probs", "actor"),
        ("values", "critic"),
        ("train_critic", "critic"),
        ("train_actor", "actor"),
        ("weight_sync", "actor"),
    ]
    assert [phase.name for phase in phases if phase.is_training] == ["train_critic", "train_actor"]
    concurrent = ["scores", "ref_log_probs", "old_log_probs", "values"]
    assert [phase.name for phase in phases if phase.is_concurrent] == concurrent
    awake = [phase.name for phase in phases if phase.generator is GeneratorMemory.everything]
    assert awake == ["rollout", *concurrent] and phases[-1].generator is GeneratorMemory.weights
    assert all(
        phase.needs[phase.role] == (TRAINING if phase.is_training else FORWARD) for phase in phases if phase.role
    )


def test_an_ensemble_scores_in_phases_of_its_own_and_the_first_waits_during_the_rollout() -> None:
    phases = ppo_phases(reward_models=["reward_models.0", "reward_models.1"], actor_scores_old=False)
    assert [phase.name for phase in phases[:3]] == ["rollout", "scores_0", "scores_1"]
    assert phases[0].needs == {"reward_models.0": FORWARD} and "old_log_probs" not in [phase.name for phase in phases]
    assert ppo_phases(reward_models=[], actor_scores_old=True, actor_generates=True)[0].needs == {"actor": FORWARD}


def test_without_a_critic_its_phases_are_absent() -> None:
    phases = ppo_phases(reward_models=["reward_model"], actor_scores_old=True, has_critic=False)
    check_order(phases)
    names = ["rollout", "scores", "ref_log_probs", "old_log_probs", "train_actor", "weight_sync"]
    assert [phase.name for phase in phases] == names
    assert {name for phase in phases for name in phase.needs} == {"reward_model", "reference", "actor"}


def test_old_log_probs_of_the_generator_need_no_phase_of_the_actor() -> None:
    """Where they come from the rollout, the actor's first phase is its training."""
    first = {}
    for source in ("actor", "rollout"):
        config = load_config(str(ROOT / "configs/ppo/word_sort.yaml"), [f"algorithm.old_log_probs={source}"]).config
        first[source] = next(phase.name for phase in step_phases(config) if phase.role == "actor")
    assert first == {"actor": "old_log_probs", "rollout": "train_actor"}


def test_every_role_lives_on_all_ranks_and_rank_0_has_the_generator() -> None:
    config = load_config(str(ROOT / "configs/ppo/word_sort.yaml"), []).config
    placement = run_placement(config, 4)
    assert {name: list(ranks) for name, ranks in placement.ranks.items()} == {
        name: [0, 1, 2, 3] for name in run_roles(config)
    }
    assert placement.generator_rank == 0


def test_a_phase_reads_what_an_earlier_one_wrote() -> None:
    phases = ppo_phases(reward_models=["reward_model"], actor_scores_old=True)
    check_order(phases)
    with pytest.raises(ValueError, match="phase 'scores' reads rollout, which no phase before it writes"):
        check_order(phases[1:])
    with pytest.raises(ValueError, match="phase 'train_critic' reads values, which no phase before it writes"):
        check_order([phase for phase in phases if phase.name != "values"])
    with pytest.raises(ValueError, match="phase 'train_actor' is in the step twice"):
        check_order([*phases, training_phase("actor")])
    with pytest.raises(ValueError, match="phase 'x' needs nothing of critic"):
        check_order([Phase("x", "critic", {"actor": FORWARD})])


def sections_of(schema: type) -> set[str]:
    """Return the fields of a run's schema that are roles, or lists of them."""
    return {
        name
        for name, hint in get_type_hints(schema).items()
        if any(isinstance(kind, type) and issubclass(kind, RoleConfig) for kind in (hint, *get_args(hint)))
    }


def test_every_role_of_every_kind_of_run_has_its_section() -> None:
    assert set().union(*(sections_of(schema) for schema in SCHEMAS.values())) == ROLE_SECTIONS.keys()
    for kind in SCHEMAS:
        for name, spec in run_roles(load_config(str(ROOT / f"configs/{kind}/word_sort.yaml"), []).config).items():
            assert spec.name == name and isinstance(spec.config, RoleConfig)
            assert spec.is_trained is isinstance(spec.config, TrainedRoleConfig)


@pytest.mark.parametrize("kind", SCHEMAS)
def test_plan_trace_residency_export_and_checkpoints_read_one_list(kind: str) -> None:
    """All of them have the roles of ``run_roles`` and the phases of ``step_phases``, and no others."""
    from hetero_ppo.engines.shared_device import SharedDevice
    from hetero_ppo.memory.plan import plan_memory
    from hetero_ppo.trainers.export import trained_specs

    config = load_config(str(ROOT / f"configs/{kind}/word_sort.yaml"), []).config
    phases, roles = step_phases(config), run_roles(config)
    check_order(phases)
    for spec in roles.values():
        spec.config.model.path = str(ROOT / "examples/memory/qwen3_8b")
        section = spec.name.partition(".")[0]
        assert section in LANES and section in LANE_COLOURS
    assert {name for phase in phases for name in phase.needs} == roles.keys()
    plan = plan_memory(config, 1)
    assert [(phase.phase, phase.computing) for phase in plan.phases] == [(phase.name, phase.role) for phase in phases]
    assert [role.name for role in plan.roles] == list(roles)
    assert SharedDevice(ResidencyConfig(offload=False), phases).schedule == phases
    trained = {phase.role for phase in phases if phase.is_training}
    batching = derive_ppo(config, 1, 1000) if isinstance(config, PpoConfig) else derive_supervised(config, 1, 1000)
    saved = batching.roles.keys() if isinstance(batching, PpoBatching) else {batching.role.role}
    assert trained_specs(config).keys() == saved == trained


def test_the_picture_of_the_docs_has_every_phase_and_role() -> None:
    phases = ppo_phases(reward_models=["reward_model"], actor_scores_old=True)
    text = re.sub(r"<[^>]*>", " ", (ROOT / "docs" / "turns.svg").read_text())
    words = set(text.split())
    assert {word for phase in phases for word in phase.name.split("_", 1)} <= words
    assert {"generator", *(phase.role for phase in phases if phase.role is not None)} <= words


def test_the_index_of_the_docs_links_every_page_and_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "index.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages <= set(re.findall(r"\]\(([\w.]+\.md)\)", text))
    for name in re.findall(r"`((?:\w+/)+\w+\.py|(?:\w+/)+)`", text):
        assert (ROOT / "hetero_ppo" / name).exists() or (ROOT / name).exists(), name

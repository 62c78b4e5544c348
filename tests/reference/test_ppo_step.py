"""Steps of PPO are those of ``ppo_step.py``, written from the papers: in one process, with DP 2 and with TP 2."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.helpers.chain import read_metrics
from tests.reference.configurations import COMMON, CONFIGURATIONS, LAYOUTS, NUM_STEPS, folder
from tests.reference.ppo_step import Ppo
from tests.reference.recorded import read_config, read_responses

from hetero_ppo.algorithms.advantage_registry import ESTIMATORS
from hetero_ppo.config.schema import PpoConfig

pytestmark = pytest.mark.slow

COMPARED_STEPS = (1, 3)
#: Of the update's size: fp32 sums in another order, and Adam's steps, which divide a gradient by its own size.
WEIGHTS = 2e-4
#: Of a metric, and of its unit where it is a difference of sums that nearly cancel.
METRICS = {"rel": 2e-5, "abs": 5e-6}


@dataclasses.dataclass(frozen=True)
class Expected:
    """Results of the reference for a step."""

    experience: Any
    metrics: dict[str, float]
    weights: dict[str, dict[str, torch.Tensor]]  # role -> name -> tensor, after the step


@pytest.fixture(scope="module")
def expected(reference_runs: Path) -> Iterator[dict[str, list[Expected]]]:
    """Configuration -> the reference's steps; the first entry holds the weights before them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = reference_runs
    yield {name: reference_steps(folder(root, name, "one process"), root) for name in CONFIGURATIONS}
    torch.set_num_threads(threads)


def reference_steps(run_dir: Path, root: Path) -> list[Expected]:
    namespace: dict[str, Any] = {}
    exec((root / "functions.py").read_text(), namespace)  # noqa: S102  the run's own reward functions
    functions = {
        "score": lambda response: namespace["score"](None, response, None, None),
        "scores": lambda response: namespace["scores"](None, [response], None, None)[0],
        "slow_score": lambda response: asyncio.run(namespace["slow_score"](None, response, None, None)),
    }
    config = read_config(run_dir)
    ppo = Ppo(config, functions.get((config.reward.function or "").rpartition(":")[2]))
    steps = [Expected(None, {}, weights_of(ppo))]
    for step in range(1, NUM_STEPS + 1):
        experience, metrics = ppo.step(read_responses(run_dir / "rollouts" / f"step_{step:06d}.jsonl"))
        steps.append(Expected(experience, metrics, weights_of(ppo)))
    return steps


def weights_of(ppo: Ppo) -> dict[str, dict[str, torch.Tensor]]:
    roles = {"actor": ppo.actor.model, "critic": ppo.critic.model}
    return {
        role: {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for role, model in roles.items()
    }


CASES = [(name, layout, step) for name in CONFIGURATIONS for layout in LAYOUTS for step in COMPARED_STEPS]


@pytest.fixture(params=CASES, ids=lambda case: ", ".join(map(str, case)))
def case(request: pytest.FixtureRequest, reference_runs: Path, expected: dict[str, list[Expected]]) -> Any:
    name, layout, step = request.param
    run_dir = folder(reference_runs, name, layout)
    recorded = torch.load(run_dir / f"recorded_{step}.pt", weights_only=True)
    responses = read_responses(run_dir / "rollouts" / f"step_{step:06d}.jsonl")
    return SimpleNamespace(
        recorded=recorded,
        responses=responses,
        metrics=read_metrics(run_dir)[step],
        expected=expected[name][step],
        before=expected[name][0].weights,
        step=step,
    )


def test_the_experience_is_the_papers(case: Any) -> None:
    """Log-probs, values, rewards, advantages, returns and importance weights token by token; and scores."""
    ours, theirs = case.recorded, case.expected.experience
    pairs = {
        "old_log_probs": theirs.old,
        "ref_log_probs": theirs.ref,
        "values": theirs.values,
        "token_level_rewards": theirs.rewards,
        "advantages": theirs.advantages,
        "returns": theirs.returns,
        "tis_weights": theirs.weights,
    }
    for name, rows in pairs.items():
        if name not in ours:
            assert name == "tis_weights" and all(weight == 1 for row in rows for weight in row)
            continue
        for i, response in enumerate(case.responses):
            start, end = len(response.prompt) - 1, len(response.prompt) + len(response.tokens) - 1
            used = i in theirs.used
            row = rows[i] if used else [0.0] * len(response.tokens)
            if used or name not in ("old_log_probs", "ref_log_probs"):
                assert ours[name][i, start:end].tolist() == pytest.approx(row, rel=2e-5, abs=2e-5), (name, i)
            assert not ours[name][i, :start].any() and not ours[name][i, end:].any(), (name, i)
    assert ours["scores"].tolist() == pytest.approx(theirs.scores, rel=1e-5, abs=1e-5, nan_ok=True)


def test_metrics_are_those_of_the_papers(case: Any) -> None:
    for name, value in case.expected.metrics.items():
        assert case.metrics[name] == pytest.approx(value, **METRICS), name
    no_papers = ("memory/", "pipeline/", "rollout/generate_s", "health/")
    assert {name for name in case.metrics if not name.startswith(no_papers)} == case.expected.metrics.keys()


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_weights_after_the_updates(case: Any, role: str) -> None:
    ours, theirs, before = case.recorded[role], case.expected.weights[role], case.before[role]
    assert ours.keys() == theirs.keys() - ({"lm_head.weight"} if role == "actor" else set())
    distance = math.hypot(*(float((ours[name] - theirs[name]).norm()) for name in ours))
    update = math.hypot(*(float((theirs[name] - before[name]).norm()) for name in ours))
    assert distance <= WEIGHTS * update, distance / update


def test_every_option_is_given_another_value_than_its_default() -> None:
    """A new option of these sections needs a configuration."""
    config = PpoConfig()
    sections = {"algorithm": config.algorithm, "reward": config.reward, "optimizer": config.actor.optimizer}
    given: dict[str, set[Any]] = {}
    for fields in (COMMON, *CONFIGURATIONS.values()):
        for name, value in fields.items():
            name = name.removeprefix("actor.").removeprefix("critic.")
            given.setdefault(name, set()).add(str(value) if isinstance(value, list) else value)
    for section, node in sections.items():
        for name, default in options(node, section):
            plain = default.value if isinstance(default, Enum) else default
            others = {value for value in given.get(name, set()) if value != plain}
            if name == "algorithm.advantage":
                assert others | {plain} == ESTIMATORS.keys(), "an estimator is in no configuration"
                continue
            assert others, f"{name} has no other value than {plain!r} in any configuration"
            if isinstance(default, Enum):
                choices = {choice.value for choice in type(default)}
                assert others | {plain} == choices, f"{name}: {choices - others} are in no configuration"


def options(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the (dotted name, default) of every option below a section."""
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            yield from options(value, f"{prefix}.{field.name}")
        else:
            yield f"{prefix}.{field.name}", value

"""Whatever fails while a PPO run is opened, or while it trains, what was opened before is closed in the reverse order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from tests.helpers.one_rank import ONE_RANK

from hetero_ppo.config.schema import Dtype, PpoConfig
from hetero_ppo.engines.shared_device import SharedDevice
from hetero_ppo.experience.bank import RolloutBank
from hetero_ppo.rollout.generator import Capabilities, NullGenerator
from hetero_ppo.trainers import open_ppo as opening
from hetero_ppo.trainers import ppo_nodes
from hetero_ppo.trainers.open_ppo import open_ppo
from hetero_ppo.trainers.ppo_generator import StartingGenerator
from hetero_ppo.trainers.run import Run

#: Every resource of a run, in the order of opening.
RESOURCES = ["functions", "node servers", "generator", "device", "bank"]
#: What may fail, and the number of resources that are open by then.
STAGES = {
    "load_data": 0,
    "load_re_encoders": 1,
    "check": 1,
    "check_inputs": 1,
    "find_nodes": 1,
    "NodeServers": 1,
    "build_generator": 2,
    "SharedDevice": 3,
    "build_roles": 4,
    "build_maker": 4,
    "open_bank": 4,
    "Evaluator": 5,
    "fit": 5,
}


class Fault(Exception):
    """The error of the stage that fails."""


def fail(*_: Any, **__: Any) -> NoReturn:
    raise Fault


class CanResume(NullGenerator):
    """A generator on this rank whose responses are banked; it starts and ends in no time."""

    is_here = True

    def __init__(self) -> None:
        super().__init__(Capabilities(can_resume=True))


class FunctionDouble:
    """Stands for a function whose workers would be processes."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def open(self) -> None: ...

    def check(self) -> None: ...

    def describe(self) -> str:
        return "scores"

    def close(self) -> None: ...


class NodeServersDouble:
    """Stands for the servers of a node, which would be processes."""

    def __init__(self, *_: object) -> None: ...

    def begin(self) -> None: ...

    def close(self) -> None: ...


class Opened:
    """Names of the resources as they are opened and closed."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.closed: list[str] = []

    def watch(self, patch: pytest.MonkeyPatch, name: str, kind: type, opens: str, closes: str) -> None:
        """Note the calls of the two methods of a class, which do what they did."""
        for method, names in ((opens, self.opened), (closes, self.closed)):
            patch.setattr(kind, method, self._noting(getattr(kind, method), name, names))

    @staticmethod
    def _noting(method: Callable[..., Any], name: str, names: list[str]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            result = method(*args, **options)
            if name not in names:
                names.append(name)
            return result

        return call


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    opened = Opened()
    kinds = (FunctionDouble, NodeServersDouble, CanResume, SharedDevice, RolloutBank)
    methods = (("open", "close"), ("begin", "close"), ("start", "close"), ("__init__", "close"), ("__init__", "end"))
    for name, kind, (opens, closes) in zip(RESOURCES, kinds, methods, strict=True):
        opened.watch(monkeypatch, name, kind, opens, closes)
    return opened


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> PpoConfig:
    """A run whose data, models and processes are stand-ins; its bank, its device and their threads are real."""
    config = PpoConfig()
    config.reward.function, config.checkpoint.every = "scorer.py:score", 1
    config.actor.model.dtype = Dtype.fp32
    encoder = SimpleNamespace(decode=None)
    data = SimpleNamespace(encoder=encoder, train=[], datasets=[])
    roles = SimpleNamespace(actor=None, engines={}, reward_models=[])
    batching = SimpleNamespace(total_steps=3, chunk_size=1, describe=lambda: "")
    for module, name, value in (
        (opening.ppo_memory, "log_plan", None),
        (opening, "load_data", data),
        (opening, "load_re_encoders", {}),
        (opening, "text_inputs", []),
        (opening, "model_inputs", []),
        (opening, "derive_ppo", batching),
        (opening.ppo_nodes, "find_nodes", SimpleNamespace(node=1, counts=[1, 1])),
        (opening.ppo_generator, "build_generator", CanResume()),
        (opening, "build_roles", roles),
        (opening, "golden_guards", []),
        (opening, "build_maker", None),
        (opening, "Evaluator", None),
        (ppo_nodes, "server_spec", None),
    ):
        monkeypatch.setattr(module, name, lambda *_, value=value, **__: value)
    monkeypatch.setattr(ppo_nodes, "NodeServers", NodeServersDouble)
    monkeypatch.setattr(opening.ppo_functions, "FunctionReward", FunctionDouble)
    monkeypatch.setenv("LOCAL_RANK", "0")
    return config


def a_run(folder: Path) -> Run:
    watchdog: Any = SimpleNamespace(progress=None)
    return Run(folder, ONE_RANK, SimpleNamespace(), watchdog, SimpleNamespace(), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_closes_what_was_opened_before(
    stage: str, config: PpoConfig, opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owners: dict[str, Any] = {"check": FunctionDouble, "check_inputs": Run}
    owners |= {"find_nodes": ppo_nodes, "NodeServers": ppo_nodes}
    owners |= {"build_generator": opening.ppo_generator, "open_bank": opening.ppo_bank}
    if stage != "fit":
        monkeypatch.setattr(owners.get(stage, opening), stage, fail)
    with pytest.raises(Fault), open_ppo(config, a_run(tmp_path)):
        fail()
    assert sorted(opened.opened, key=RESOURCES.index) == RESOURCES[: STAGES[stage]]
    assert opened.closed == RESOURCES[: STAGES[stage]][::-1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("residency", "rollout"))]


def test_a_failing_start_is_raised_where_the_generator_is_needed(
    config: PpoConfig, opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CanResume, "start", fail)
    with pytest.raises(Fault), open_ppo(config, a_run(tmp_path)):
        raise AssertionError("the run was opened")
    assert opened.closed == ["device", "generator", "node servers", "functions"]


def test_an_error_does_not_wait_for_a_generator_that_is_starting() -> None:
    """It is closed by its own thread, as soon as it has started."""
    may_start, closed = threading.Event(), threading.Event()

    class Slow(CanResume):
        def start(self) -> None:
            may_start.wait(1)

        def close(self) -> None:
            closed.set()

    with pytest.raises(Fault), StartingGenerator(Slow()):
        fail()
    assert not closed.is_set()
    may_start.set()
    assert closed.wait(1)


def test_a_generator_that_sleeps_is_asleep_before_the_roles_are_built(
    config: PpoConfig, opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    generator = CanResume()
    generator.capabilities = Capabilities(can_sleep=True)
    monkeypatch.setattr(generator, "sleep", lambda: order.append("sleep"))
    monkeypatch.setattr(opening.dist, "barrier", lambda group: order.append("barrier"))
    monkeypatch.setattr(opening.ppo_generator, "build_generator", lambda *_: generator)
    monkeypatch.setattr(opening, "build_roles", lambda *_: order.append("roles") or fail())
    with pytest.raises(Fault), open_ppo(config, a_run(tmp_path)):
        pass
    assert order == ["sleep", "barrier", "roles"]


def test_an_open_run_has_its_options(config: PpoConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guarded: list[int] = []
    monkeypatch.setattr(opening, "golden_guards", lambda reward_models, every: guarded.append(every))
    monkeypatch.setattr(opening, "first_step", lambda *_: 10)
    config.train.trace_every, config.reward.golden_every = 3, 4
    with open_ppo(config, a_run(tmp_path)) as trainer:
        due = [step for step in range(11, 19) if trainer.trace.is_due(step)]
    assert due == [11, 12, 15, 18], "the first two, and every third"
    assert guarded == [4]

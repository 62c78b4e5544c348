"""Servers that die while the trainer has the device they share: when they start again, and who answers meanwhile."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from tests.helpers.one_rank import ONE_RANK
import torch
from tests.helpers.cuda_rig import VirtualCuda
from tests.helpers.generator_requests import ask, prompts_of

from hetero_ppo.config.schema import Dtype, ResidencyConfig, RolloutConfig, SamplingConfig
from hetero_ppo.engines.residency import RoleResidency
from hetero_ppo.engines.shared_device import SharedDevice
from hetero_ppo.errors import RunError
from hetero_ppo.experience.pending_rollout import PendingRollout
from hetero_ppo.rollout import vllm as vllm_module
from hetero_ppo.rollout.generator import GenerationRequest
from hetero_ppo.rollout.vllm import VllmGenerator
from hetero_ppo.rollout.servers import pool as pool_module
from hetero_ppo.rollout.servers.client import ServerDied, ServerHangs
from hetero_ppo.rollout.weights.tensor_bytes import tensor_checksum
from hetero_ppo.rollout.weights.worker_extension import _read_files
from hetero_ppo.step.kinds import TRAINING, Kind
from hetero_ppo.step.phases import ppo_phases
from hetero_ppo.trainers import ppo_turns
from hetero_ppo.trainers.ppo_turns import GeneratorTurns
from hetero_ppo.types import Response

UNIT = 1 << 12  # bytes of a tensor
TRAINED = (Kind.params, Kind.grads, Kind.main_params, Kind.moments)
TURN = 8 * len(TRAINED) * UNIT  # bytes of a trained role
SHARE, WEIGHTS = TURN, TURN // 4  # bytes that a server takes to generate, and of them its weights
# Of the device: a training turn, or a server; a server does not start beside the actor's parameters.
TOTAL = TURN + WEIGHTS
PARAMS = frozenset({Kind.params})
SAMPLING = SamplingConfig(max_tokens=1)


class Server:
    """Stands for a vLLM process: takes its share when it starts, and ends where there is no room for it."""

    cuda: VirtualCuda
    all: ClassVar[list[Server]] = []

    def __init__(self, index: int, *_: Any, **__: Any) -> None:
        self.index, self.name = index, f"rollout server {index}"
        self.state = "not started"
        self.held = self.num_spawns = 0
        self.weights: str | None = None
        self.answered: list[list[int]] = []
        Server.all.append(self)

    @property
    def running(self) -> bool:
        return self.state == "runs"

    def spawn(self) -> None:
        self.num_spawns += 1
        has_room = self.cuda.reserved + SHARE <= self.cuda.total
        self.state, self.held, self.weights = ("runs", SHARE, None) if has_room else ("no memory", 0, None)

    def die(self, state: str) -> None:
        self.state, self.held = state, self.held if state == "hangs" else 0

    def take(self, num_bytes: int) -> None:
        assert self.cuda.reserved + num_bytes <= self.cuda.total, "the server wakes where there is no room"
        self.held = num_bytes

    def kill(self) -> None:
        self.state, self.held = "killed", 0

    terminate = kill

    def wait_exit(self, timeout_s: float) -> None: ...

    def wait(self) -> None: ...

    def report(self) -> str:
        return self.state


class Client:
    """Stands for its client: what the server does is done at once."""

    when_asked: Callable[[Server], None] = staticmethod(lambda server: None)

    def __init__(self, server: Server, hang_timeout_s: float | None, on_death: Callable[[ServerDied], None]) -> None:
        self.server, self.on_death, self.num_opened = server, on_death, 0

    def check(self) -> None:
        if self.server.state == "hangs":
            raise ServerHangs("no answer")
        if not self.server.running:
            raise ServerDied(self.server.state)

    async def open(self) -> None:
        self.num_opened += 1

    async def close(self) -> None: ...

    async def healthy(self) -> bool:
        return False

    async def wait_ready(self, timeout_s: float) -> None:
        self.check()

    async def post(self, phase: str, route: str, timeout_s: float, body: Any = None) -> Any:
        self.check()
        if route.startswith("/sleep"):
            self.server.held = 0
        elif route == "/wake_up?tags=weights":
            self.server.take(max(self.server.held, WEIGHTS))
        elif route == "/wake_up?tags=kv_cache":
            self.server.take(SHARE)
        elif route == "/update_weight_version":
            self.server.weights = body["new_version"]
        return {"success": True}

    async def call_worker(self, phase: str, method: str, timeout_s: float, **arguments: Any) -> list[dict[str, Any]]:
        self.check()
        if method == "hetero_ppo_load_staged":
            return [{"wrong": [], "unread": [], "verify_s": 0.0}]
        sums = {name: tensor_checksum(tensor) for name, tensor in _read_files(arguments["paths"]).items()}
        return [{"problems": [], "checksums": sums, "verify_s": 0.0}]

    async def generate(self, prompt: list[int], *_: Any) -> Response:
        self.when_asked(self.server)
        self.check()
        self.server.answered.append(prompt)
        return Response([7], [-0.5], "stop", self.server.weights)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> VirtualCuda:
    cuda = VirtualCuda.installed(TOTAL, monkeypatch)
    monkeypatch.setattr(vllm_module, "VllmServer", Server)
    monkeypatch.setattr(pool_module, "ServerClient", Client)
    monkeypatch.setattr(Server, "cuda", cuda, raising=False)
    monkeypatch.setattr(Server, "all", [])
    return cuda


class Job:
    """Two trained roles, and servers on their device."""

    def __init__(self, cuda: VirtualCuda, folder: Path, num_servers: int = 1) -> None:
        config = RolloutConfig(num_servers=num_servers, sleep=True)
        about = {
            "model_path": str(folder),
            "dtype": Dtype.fp32,
            "run_dir": folder,
            "max_model_len": 8,
            "eos_token_ids": [1],
        }
        self.generator = VllmGenerator(config, **about, initial_version=None)
        self.generator.start()
        self.generator.sleep()
        self.device = SharedDevice(ResidencyConfig(), ppo_phases(reward_models=[], actor_scores_old=True))
        for role in ("critic", "actor"):
            tensors = {kind: [torch.zeros(UNIT, dtype=torch.uint8) for _ in range(8)] for kind in TRAINED}
            self.device.add(RoleResidency(role, tensors, [], lambda: None))
        self.turns = GeneratorTurns(self.generator, self.device, ONE_RANK, 0)
        self.sync("step0")
        self.turns.sleep()

    def train(self, role: str, inside: Callable[[], None] = lambda: None) -> None:
        with self.device.turn(role, TRAINING, f"train_{role}"):
            self.device.require(role, TRAINING, "training")
            inside()

    def sync(self, version: str) -> None:
        with self.device.turn("actor", PARAMS, "weight_sync"):
            self.turns.wake_for_sync()
            self.generator.sync_weights(iter([("a", torch.ones(4))]), version)
        self.turns.wake()

    def close(self) -> None:
        self.generator.close()
        self.device.close()


@pytest.fixture
def job(cuda: VirtualCuda, tmp_path: Path) -> Iterator[Job]:
    job = Job(cuda, tmp_path)
    yield job
    job.close()


@pytest.mark.parametrize("death", ["ended", "hangs"])
def test_a_server_that_dies_in_a_role_s_turn_starts_in_the_next_generator_turn(
    job: Job, death: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It neither starts beside the actor, where it would find no room, nor is it asked for anything until it has started."""
    caplog.set_level(logging.WARNING)
    (server,) = Server.all
    job.train("critic", lambda: server.die(death))
    job.train("actor")
    with job.device.turn("actor", PARAMS, "weight_sync"):
        job.turns.wake_for_sync()
        job.generator.sync_weights(iter([("a", torch.zeros(4))]), "step1")
        assert (server.num_spawns, server.held, job.generator.num_down) == (1, 0, 1)
    job.turns.wake()
    assert (server.num_spawns, server.held, server.weights, job.generator.num_down) == (2, SHARE, "step1", 0)
    notes = [record.message for record in caplog.records if "restart 1 of 2" in record.message]
    assert len(notes) == 1 and notes[0].endswith("in the generator's next turn: the trainer has the device")
    assert ask(job.generator, [[5]], SAMPLING, n=1, seed=0)[0][0].weight_version == "step1"


def test_a_death_that_the_watcher_sees_is_noted_once_and_ends_the_process(job: Job) -> None:
    (server,) = Server.all
    member = job.generator._started_pool().members[0]
    server.die("hangs")
    job.generator._loop.call_soon_threadsafe(member.client.on_death, ServerHangs("no answer for 9 s"))
    job.train("critic")
    while not member.is_down:
        time.sleep(0.01)
    assert (server.state, server.held, member.restarts) == ("killed", 0, 1)
    job.sync("step1")
    assert (server.num_spawns, member.restarts, server.weights) == (2, 1, "step1")


def test_deaths_that_wait_for_their_restart_count(job: Job) -> None:
    (server,) = Server.all
    for _ in range(2):
        job.train("critic", lambda: server.die("ended"))
        job.sync("step1")
        job.turns.sleep()
    with pytest.raises(RunError, match="weight sync|wake: rollout server 0 died.*\\n.*max_restarts allows 2"):
        job.train("critic", lambda: server.die("ended"))
        job.sync("step2")


def test_in_an_generator_turn_of_its_own_a_server_starts_at_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    (server,) = Server.all
    job.turns.wake()
    monkeypatch.setattr(
        Client, "when_asked", staticmethod(lambda one: one.die("ended") if one.num_spawns == 1 else None)
    )
    assert ask(job.generator, [[5]], SAMPLING, n=1, seed=0)[0][0].token_ids == [7]
    assert server.num_spawns == 2


def pending_rollout(job: Job, num_prompts: int) -> PendingRollout:
    request = GenerationRequest(prompts_of([[5 + place] for place in range(num_prompts)]), SAMPLING, n=1, seed=0)
    return PendingRollout(
        job.generator, request, ONE_RANK, generator_rank=0, version="step0", chunk_size=2, restart=job.turns.restarter
    )


def test_while_roles_compute_during_generation_other_servers_answer(
    cuda: VirtualCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two servers one dies: its prompts go to the other. When that dies too the devices are asked for, and both start."""
    job = Job(cuda, tmp_path, 2)
    first, second = Server.all
    events: list[str] = []
    spawn, restart_down = Server.spawn, job.generator.restart_down

    def when_asked(server: Server) -> None:
        if server.num_spawns == 1 and (server is first or first.state != "runs" and len(second.answered) == 2):
            server.die("ended")

    monkeypatch.setattr(Client, "when_asked", staticmethod(when_asked))
    monkeypatch.setattr(Server, "spawn", lambda server: (events.append("a server starts"), spawn(server)))
    monkeypatch.setattr(job.generator, "restart_down", lambda: (events.append("the devices are free"), restart_down()))
    job.turns.wake(shared=True)
    running = pending_rollout(job, 6).start()
    places: list[int] = []
    while not running.finished:
        for chunk in running.next_chunks():
            places += chunk.rows
            with job.device.turn("critic", PARAMS, "values", then={}):
                cuda.kernel(0.1, WEIGHTS)  # torch keeps the activations' memory
    job.close()
    assert sorted(places) == list(range(6))
    assert events == ["the devices are free", "a server starts", "a server starts"]
    assert sorted(prompt for server in Server.all for prompt in server.answered) == [[5 + place] for place in range(6)]
    assert len(second.answered) >= 2


def test_without_a_gpu_a_server_starts_at_once(
    cuda: VirtualCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda.total += 2 * TURN
    monkeypatch.setattr(ppo_turns, "platform", SimpleNamespace(HAS_CUDA=False))
    job = Job(cuda, tmp_path)
    (server,) = Server.all
    job.train("critic", lambda: server.die("ended"))
    with job.device.turn("actor", PARAMS, "weight_sync"):
        job.turns.wake_for_sync()
        assert (server.num_spawns, job.generator.num_down) == (2, 0)
    job.close()

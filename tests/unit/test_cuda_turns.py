"""The turns of roles and generator on a recording ``torch.cuda``: who waits for whom, and what the driver has left when vLLM wakes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.helpers.one_rank import ONE_RANK
import torch
from tests.helpers.cuda_rig import COPY_RATE, VirtualCuda

from hetero_ppo.config.schema import ResidencyConfig
from hetero_ppo.engines.residency import RoleResidency
from hetero_ppo.engines.shared_device import SharedDevice
from hetero_ppo.errors import RunError
from hetero_ppo.rollout.generator import Capabilities, NullGenerator
from hetero_ppo.step.kinds import TRAINING, Kind
from hetero_ppo.step.phases import ppo_phases
from hetero_ppo.memory.plan import GIB
from hetero_ppo.trainers.ppo_turns import GeneratorTurns
from hetero_ppo.trainers.ppo_memory import memory_metrics

UNIT = 1 << 12  # bytes of one tensor
TENSORS = 32  # of each kind
TRAINED = (Kind.params, Kind.grads, Kind.main_params, Kind.moments)
TURN = len(TRAINED) * TENSORS * UNIT  # bytes of a trained role
ACTIVATIONS = TURN // 4
GENERATOR, WEIGHTS = TURN, TURN // 4  # bytes that vLLM takes to generate, and of them its weights'
TOTAL = TURN + ACTIVATIONS + WEIGHTS  # of the device: it holds a training turn, or a rollout, not both


class Generator(NullGenerator):
    """Takes memory of the device as vLLM does from another process, out of what the driver has left."""

    is_here = True

    def __init__(self, cuda: VirtualCuda) -> None:
        super().__init__(Capabilities(can_sleep=True))
        self.cuda = cuda
        self.held = 0
        self.wakes: list[str] = []

    def wake(self, *, weights_only: bool = False) -> None:
        self.wakes.append("weights" if weights_only else "all")
        self.held = WEIGHTS if weights_only else GENERATOR
        if self.cuda.reserved + self.held > self.cuda.total:
            raise RunError(f"wake: no memory ({self.cuda.reserved} + {self.held} of {self.cuda.total})")

    def sleep(self) -> None:
        self.held = 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> VirtualCuda:
    return VirtualCuda.installed(TOTAL, monkeypatch)


@pytest.fixture
def device(cuda: VirtualCuda) -> Iterator[SharedDevice]:
    device = SharedDevice(ResidencyConfig(), ppo_phases(reward_models=[], actor_scores_old=True))
    for role in ("critic", "actor"):
        device.add(_role(role, TRAINED))
    device.add(_role("reference", (Kind.params,)))
    cuda.empty_cache()
    yield device
    device.close()


def _role(name: str, kinds: tuple[Kind, ...]) -> RoleResidency:
    tensors = {kind: [torch.zeros(UNIT, dtype=torch.uint8) for _ in range(TENSORS)] for kind in kinds}
    return RoleResidency(name, tensors, [], lambda: None)


def _train(device: SharedDevice, cuda: VirtualCuda, role: str, seconds: float) -> tuple[float, float]:
    """Run a training turn whose kernels are queued at once. Return their start and end."""
    with device.turn(role, TRAINING, f"train_{role}"):
        device.require(role, TRAINING, "training")
        times = cuda.kernel(seconds, ACTIVATIONS)
        device.roles[role].mark_changed(TRAINING)
    return times


def test_the_generator_finds_room_at_every_wake(device: SharedDevice, cuda: VirtualCuda) -> None:
    generator = Generator(cuda)
    turns = GeneratorTurns(generator, device, ONE_RANK, 0)
    for _ in range(3):
        with turns.generating():
            assert cuda.reserved + GENERATOR <= cuda.total
        _train(device, cuda, "critic", 1.0)
        _train(device, cuda, "actor", 1.0)
        with device.turn("actor", frozenset({Kind.params}), "weight_sync"):
            turns.wake_for_sync()
            assert cuda.reserved + WEIGHTS <= cuda.total
        turns.sleep()
    assert generator.wakes == ["all", "weights"] * 3


def test_a_wake_without_room_says_what_the_device_holds(device: SharedDevice, cuda: VirtualCuda) -> None:
    generator = Generator(cuda)
    cuda.total = GENERATOR // 2
    with pytest.raises(
        RunError, match=r"wake: no memory.*GiB are free on device 0; this rank holds .*gpu_memory_utilization"
    ):
        GeneratorTurns(generator, device, ONE_RANK, 0).wake()


def test_what_comes_ahead_does_not_wait_for_queued_kernels(device: SharedDevice, cuda: VirtualCuda) -> None:
    """A whole turn of kernels is queued when the next role's parameters begin to come in: they have come long before its end."""
    _train(device, cuda, "critic", 1.0)  # both roles' bytes have a copy in host memory that is old
    _train(device, cuda, "actor", 1.0)
    device.settle()
    cuda.waits.clear()
    cuda.copies.clear()
    long = 100 * TURN / COPY_RATE
    cuda.total = 2 * TOTAL  # room for what comes ahead
    device.limit = 2 * TURN
    with device.turn("critic", frozenset({Kind.params}), "values", then={"actor": frozenset({Kind.params})}):
        _, end = cuda.kernel(long)
        device._wait(device.roles["actor"].blocks)
    into_actor = [copy for copy in cuda.copies if copy.stream == "stream 1"]
    assert into_actor and all(copy.end < end for copy in into_actor)
    assert not [pair for pair in cuda.waits if pair[1] == "default"]


def test_what_leaves_was_computed_before_it_is_copied(device: SharedDevice, cuda: VirtualCuda) -> None:
    _, computed = _train(device, cuda, "critic", 5.0)
    cuda.copies.clear()
    _train(device, cuda, "actor", 1.0)
    device.settle()
    out = [copy for copy in cuda.copies if copy.stream == "stream 2"]
    assert sum(copy.num_bytes for copy in out) >= 3 * TENSORS * UNIT  # gradients are not copied
    assert all(copy.begin >= computed for copy in out)


def test_the_ledger_has_what_torch_reserved_beside_what_it_allocated(device: SharedDevice, cuda: VirtualCuda) -> None:
    """Activations are gone when a turn has ended; their memory is torch's until the generator wakes."""
    _train(device, cuda, "critic", 1.0)
    assert device.ledger.reserved_phases == {"train_critic": TURN + ACTIVATIONS}
    entry = device.ledger.record("train_critic", "after")
    assert (entry.reported, entry.reserved, entry.cached) == (TURN, TURN + ACTIVATIONS, ACTIVATIONS)
    metrics = memory_metrics(device)
    assert metrics["memory/reserved_gib"] * GIB == TURN + ACTIVATIONS
    assert metrics["memory/allocated_gib"] * GIB == TURN
    assert metrics["memory/cached_gib"] * GIB >= ACTIVATIONS
    GeneratorTurns(NullGenerator(Capabilities(can_sleep=True)), device, ONE_RANK, 0).wake()
    assert device.ledger.record("rollout", "after").cached == 0


def test_without_cuda_nothing_is_said_of_reserved_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SharedDevice(ResidencyConfig(offload=False))
    device.add(_role("critic", TRAINED))
    with device.turn("critic", TRAINING, "train_critic"):
        pass
    assert device.ledger.entries and device.ledger.reserved_phases == {}
    assert not [
        name for name in memory_metrics(device) if "reserved" in name or "allocated" in name or "cached" in name
    ]

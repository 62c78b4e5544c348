"""Turns on a shared device, in one process: bytes really leave and come back, bits stay, misuse has a name."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from hetero_ppo.config.schema import (
    Dtype,
    ModelConfig,
    OptimizerConfig,
    ResidencyConfig,
    RoleConfig,
    TrainedRoleConfig,
)
from hetero_ppo.engines.loss_terms import LossTerm
from hetero_ppo.engines.losses import sft_loss_fn
from hetero_ppo.engines.model_engine import ModelEngine
from hetero_ppo.engines.outputs import log_probs_output, scores_output, values_output
from hetero_ppo.engines.residency import Block, ResidencyError
from hetero_ppo.engines.shared_device import SharedDevice
from hetero_ppo.engines.train_engine import TrainEngine
from hetero_ppo.memory.ledger import total
from hetero_ppo.memory.plan_storage import RoleStorage
from hetero_ppo.observability.trace import COPY_IN, COPY_OUT, TraceRecorder, newest_trace
from hetero_ppo.step.kinds import FORWARD, Kind
from hetero_ppo.step.phases import ppo_phases
from hetero_ppo.types import AnswerInputs
from megatron_bridge.platform.copies import CopyLane

pytestmark = pytest.mark.usefixtures("world")

VOCAB, ROWS, LENGTH = 96, 4, 12
SCHEDULE = ppo_phases(reward_models=["reward_model"], actor_scores_old=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    config = Qwen3Config(vocab_size=VOCAB, num_attention_heads=4, num_key_value_heads=2, **sizes)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


class Roles:
    """The four roles on one device, and a step that uses all of them."""

    def __init__(
        self, model: Path, dtype: Dtype, distributed: bool, *, trace: TraceRecorder | None = None, **residency: Any
    ) -> None:
        self.device = SharedDevice(ResidencyConfig(**residency), SCHEDULE, trace)
        trained = TrainedRoleConfig(
            model=ModelConfig(path=str(model), dtype=dtype),
            optimizer=OptimizerConfig(lr=1e-2, distributed=distributed),
            micro_batch_size=2,
        )
        plain = RoleConfig(model=ModelConfig(path=str(model), dtype=dtype), micro_batch_size=2)
        self.actor = TrainEngine("actor", trained, "lm", 10, self.device)
        self.critic = TrainEngine("critic", trained, "value", 10, self.device)
        self.reference = ModelEngine("reference", plain, "lm", device=self.device)
        self.reward = ModelEngine("reward_model", plain, "score", device=self.device)
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator)
        self.lengths = torch.full((ROWS,), LENGTH)
        self.mask = torch.ones(ROWS, LENGTH - 1, dtype=torch.bool)

    def log_probs(self, engine: ModelEngine) -> Tensor:
        output = log_probs_output(temperature=1.0, vocab_size=VOCAB, groups=engine.groups)
        return engine.forward(self.ids, self.lengths, output)

    def step(self) -> list[Tensor]:
        """Run all phases of a PPO step in order. Return their results."""
        self.device.generator_turn("rollout")
        with self.reward.on_device(phase="scores"):
            results = [self.reward.forward(self.ids, self.lengths, scores_output)]
        with self.reference.on_device(phase="ref_log_probs"):
            results.append(self.log_probs(self.reference))
        with self.actor.on_device(phase="old_log_probs"):
            results.append(self.log_probs(self.actor.model))
        with self.critic.on_device(phase="values"):
            results.append(self.critic.model.forward(self.ids, self.lengths, values_output))
        for engine in (self.critic, self.actor):
            with engine.on_device(grads=True, optimizer=True, phase=f"train_{engine.role}"):
                results.append(self.train(engine))
        with self.actor.on_device(phase="weight_sync"):
            results += [tensor.clone() for _, tensor in self.actor.model.stream_weights()]
        return results

    def train(self, engine: TrainEngine) -> Tensor:
        parts = engine.microbatches(self.ids, self.lengths, AnswerInputs(self.mask), range(ROWS))
        loss_fn = sft_loss_fn(VOCAB, engine.groups) if engine.model.head == "lm" else _square_loss
        result = engine.train_step([LossTerm(parts, loss_fn, self.mask.sum().item())])
        return torch.tensor([result.loss, result.grad_norm])

    def close(self) -> None:
        self.device.close()


def _square_loss(output: Tensor, microbatch: Any) -> Any:
    from hetero_ppo.algorithms.losses import Loss

    loss = values_output(output, microbatch).square().sum()
    return Loss(loss, microbatch.inputs.mask.sum().float(), {"loss": loss.detach().double()})


OPTIMIZERS = {
    "fp32": (Dtype.fp32, False),
    "bf16": (Dtype.bf16, False),
    "fp32 dist": (Dtype.fp32, True),
    "bf16 dist": (Dtype.bf16, True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bits_are_those_of_roles_that_stay(name: str, model: Path) -> None:
    steps = {}
    for mode in ({"offload": False}, {"overlap": True}, {"overlap": False}):
        roles = Roles(model, *OPTIMIZERS[name], **mode)
        steps[str(mode)] = [result for _ in range(3) for result in roles.step()]
        roles.close()
    stay, overlapped, serial = steps.values()
    assert len(stay) > 20
    for one, two, three in zip(stay, overlapped, serial, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


@pytest.fixture(params=["bf16", "fp32 dist"])
def roles(request: pytest.FixtureRequest, model: Path) -> Iterator[Roles]:
    roles = Roles(model, *OPTIMIZERS[request.param])
    yield roles
    roles.close()


def test_the_device_holds_one_turn(roles: Roles) -> None:
    roles.device.peak_bytes = 0
    for _ in range(2):
        roles.step()
    sizes = {name: residency.num_bytes(frozenset(Kind)) for name, residency in roles.device.roles.items()}
    assert roles.device.limit == max(sizes["actor"], sizes["critic"])
    assert roles.device.peak_bytes <= roles.device.limit
    assert max(sizes.values()) < 0.55 * sum(sizes[name] for name in ("actor", "critic")) < sum(sizes.values())


def test_the_ledger_reads_the_storages(roles: Roles) -> None:
    """Hand-worked: the model has n parameters, the bf16 actor 2n + 4n + 4n + 8n bytes; outside of a turn none on the device."""
    for _ in range(2):
        roles.step()
    roles.device.generator_turn("rollout")
    roles.device.settle()
    entry = roles.device.ledger.record("rollout", "after")
    held = {role: sum(kinds.values()) for role, kinds in entry.device.items()}
    assert held["actor"] == held["critic"] == 0
    assert held["reward_model"] > 0 and entry.device_bytes < total(entry.host)
    actor = roles.device.ledger.phases["train_actor"]["actor"]
    if roles.actor.config.model.dtype is Dtype.bf16:
        n = sum(p.numel() for chunk in roles.actor.model.models for p in chunk.parameters())
        assert actor == {Kind.params: 2 * n, Kind.grads: 4 * n, Kind.main_params: 4 * n, Kind.moments: 8 * n}
    assert set(roles.device.ledger.phases) == {phase.name for phase in SCHEDULE}


@pytest.mark.parametrize("overlap", [True, False])
def test_one_role_comes_in_while_the_other_leaves(model: Path, overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The critic's last bytes do not leave before some of the actor's have come in, as far as anything comes in meanwhile."""
    roles = Roles(model, Dtype.bf16, False, overlap=overlap)
    critic, actor = (roles.device.roles[role] for role in ("critic", "actor"))
    move_out, move_in, came_in = critic.move_out, actor.move_in, threading.Event()
    left: list[Block] = []

    def leave(blocks: Sequence[Block], lane: CopyLane) -> int:
        if not left:
            came_in.clear()  # what came ahead of the switch
        left.extend(blocks)
        if len(left) == len(critic.blocks):
            assert came_in.wait(20.0 if overlap else 0.2) == overlap
        return move_out(blocks, lane)

    def come(blocks: Sequence[Block], lane: CopyLane) -> int:
        came_in.set()
        return move_in(blocks, lane)

    with roles.critic.on_device(grads=True, optimizer=True, phase="train_critic"):
        roles.train(roles.critic)
        monkeypatch.setattr(critic, "move_out", leave)
        monkeypatch.setattr(actor, "move_in", come)
    with roles.actor.on_device(grads=True, optimizer=True, phase="train_actor"):
        roles.train(roles.actor)
    assert len(left) == len(critic.blocks) and came_in.is_set()
    roles.close()


def test_no_gradient_outlives_its_buffer(roles: Roles) -> None:
    """What an optimizer hangs on its main parameters would hold device memory that no role accounts for."""
    roles.step()
    roles.device.generator_turn("idle")
    roles.device.settle()
    assert total(roles.device.ledger.look()[0]) == 0
    for engine in (roles.actor, roles.critic):
        assert all(parameter.grad is None for chunk in engine.model.models for parameter in chunk.parameters())
        stepped = [p for group in engine.optimizer.param_groups for p in group["params"]]
        assert stepped and all(parameter.grad is None for parameter in stepped)


def test_memory_is_flat_over_twenty_cycles(roles: Roles) -> None:
    """The same bytes, in host buffers that are where they were in the beginning."""
    looks = []
    for _ in range(20):
        roles.step()
        roles.device.generator_turn("rollout")
        roles.device.settle()
        device, host = roles.device.ledger.look()
        buffers = [
            block.host for role in roles.device.roles.values() for block in role.blocks if block.host is not None
        ]
        places = tuple(buffer.data_ptr() for buffer in buffers)
        looks.append((total(device), total(host), len(roles.device.roles["actor"].blocks), places))
    assert len(set(looks[1:])) == 1, looks


def test_only_what_changed_is_copied_out(roles: Roles) -> None:
    roles.step()
    roles.device.settle()
    roles.device.collect_cost()
    for engine, phase in ((roles.reward, "scores"), (roles.reference, "ref_log_probs"), (roles.critic, "values")):
        with engine.on_device(phase=phase):
            pass
    roles.device.generator_turn("rollout")
    roles.device.settle()
    cost = roles.device.collect_cost()
    # The actor's parameters, which were on the device for the weight sync: the others are as they came.
    assert cost.bytes_out == roles.device.roles["actor"].num_bytes(FORWARD)
    roles.step()
    roles.device.generator_turn("rollout")
    roles.device.settle()
    trained = [roles.device.roles[role] for role in ("actor", "critic")]
    assert roles.device.collect_cost().bytes_out == sum(one.num_bytes(one.kinds - {Kind.grads}) for one in trained)


MISUSES: dict[str, tuple[str, Callable[[Roles], Any]]] = {
    "forward outside of a turn": ("actor: a forward needs its params", lambda r: r.log_probs(r.actor.model)),
    "parameter outside of a turn": (
        "actor: .* touches a parameter",
        lambda r: next(r.actor.model.models[0].parameters()) + 1,
    ),
    "parameter by way of a module": (
        "critic: .* touches a parameter",
        lambda r: r.critic.model.models[0].embedding.word_embeddings.weight.sum(),
    ),
    "state dict": (
        "actor: .* touches a parameter",
        lambda r: {
            k: v.clone() for k, v in r.actor.model.models[0].state_dict(keep_vars=True).items() if isinstance(v, Tensor)
        },
    ),
    "export": ("actor: an export needs", lambda r: r.actor.model.export("/nowhere")),
    "reading weights": ("actor: reading its weights needs", lambda r: list(r.actor.model.stream_weights())),
    "optimizer of an untrained role": (
        "reference: .*without training",
        lambda r: r.reference.on_device(optimizer=True, phase="x"),
    ),
    "loading": ("actor: loading a checkpoint needs", lambda r: r.actor.load(Path("/nowhere"))),
}


@pytest.mark.parametrize("what", MISUSES)
def test_misuse_names_role_and_phase(what: str, roles: Roles) -> None:
    roles.step()
    message, misuse = MISUSES[what]
    with pytest.raises(ResidencyError, match=message) as error:
        misuse(roles)
    assert "phase" in str(error.value)
    roles.step()  # and nothing is broken


def test_turns_do_not_nest(roles: Roles) -> None:
    with roles.actor.on_device(phase="old_log_probs"):
        for inner in (roles.actor, roles.critic):
            message = f"{inner.role}: phase 'values' begins inside the turn of actor in phase 'old_log_probs'"
            with pytest.raises(ResidencyError, match=message), inner.on_device(phase="values"):
                pass
        with pytest.raises(ResidencyError, match="'rollout' begins inside"):
            roles.device.generator_turn("rollout")
        with pytest.raises(ResidencyError, match="actor: training needs its grads, params on the device"):
            roles.train(roles.actor)
        roles.log_probs(roles.actor.model)
    wrong = pytest.raises(ResidencyError, match="critic: an optimizer step needs")
    with roles.critic.on_device(grads=True, phase="train_critic"), wrong:
        roles.train(roles.critic)


def test_an_error_in_a_turn_ends_it(roles: Roles) -> None:
    expected = Roles(Path(roles.actor.config.model.path), roles.actor.config.model.dtype, False, offload=False).step()
    turn = roles.critic.on_device(grads=True, optimizer=True, phase="train_critic")
    with pytest.raises(FloatingPointError), turn:
        raise FloatingPointError
    for one, two in zip(roles.step()[:4], expected):
        assert torch.equal(one, two)


def test_out_of_schedule_turns_take_the_place_of_what_came_ahead(roles: Roles) -> None:
    for _ in range(3):
        for engine in (roles.critic, roles.actor, roles.critic):
            with engine.on_device(grads=True, optimizer=True, phase=f"train_{engine.role}"):
                pass
            with roles.reference.on_device(phase="eval"):
                roles.log_probs(roles.reference)
    assert roles.device.peak_bytes <= roles.device.limit


def test_a_turn_that_is_left_out_holds_nothing_up(roles: Roles) -> None:
    """While the critic is warmed up the actor is not trained: what is already on its way to the device for that gives way to the weight sync."""

    def steps() -> None:
        for _ in range(5):
            with roles.critic.on_device(grads=True, optimizer=True, phase="train_critic"):
                roles.train(roles.critic)
            with roles.actor.on_device(phase="weight_sync"):
                roles.log_probs(roles.actor.model)

    thread = threading.Thread(target=steps, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "the copies wait for each other"


def test_a_role_leaves_even_if_its_turn_is_the_next_but_one(model: Path) -> None:
    """Two roles in turns, each the one ahead of the other: what is here for later may not stand in the way."""
    roles = Roles(model, Dtype.bf16, False)
    roles.device.schedule = [phase for phase in SCHEDULE if phase.is_training]
    for _ in range(3):
        for engine in (roles.critic, roles.actor):
            with engine.on_device(grads=True, optimizer=True, phase=f"train_{engine.role}"):
                roles.train(engine)
    roles.close()
    assert roles.device.peak_bytes <= roles.device.limit


def test_a_turn_that_is_left_out_does_not_stand_in_the_way(roles: Roles) -> None:
    """The critic warms up: after its training the actor's gradients and optimizer wait for free memory, and are not needed any more."""

    def two_steps() -> None:
        for _ in range(2):
            with roles.critic.on_device(grads=True, optimizer=True, phase="train_critic"):
                roles.train(roles.critic)
            with roles.actor.on_device(phase="weight_sync"):
                roles.log_probs(roles.actor.model)
            roles.device.generator_turn("rollout")
        roles.device.settle()

    thread = threading.Thread(target=two_steps, daemon=True)
    thread.start()
    thread.join(60.0)
    assert not thread.is_alive(), "the lanes wait for each other"
    assert roles.device.peak_bytes <= roles.device.limit
    roles.step()


def test_the_next_role_is_on_its_way_before_its_turn(roles: Roles) -> None:
    """Its parameters come in during the turn before, as the schedule says, where there is room beside that turn's own."""
    order = (
        (roles.reward, "scores"),
        (roles.reference, "ref_log_probs"),
        (roles.actor, "old_log_probs"),
        (roles.critic, "values"),
    )
    for (engine, phase), (following, _) in itertools.pairwise(order):
        with engine.on_device(phase=phase):
            roles.device.settle()
            device, _ = following.residency.bytes_by_kind()
            assert device[Kind.params] == following.residency.num_bytes(FORWARD), following.role


def test_a_checkpoint_comes_straight_from_host_buffers(roles: Roles, tmp_path: Path) -> None:
    """A checkpoint from the device or from the host, written while the role trains on, loads what was saved. The device stays as it was."""
    folders = [tmp_path / "device", tmp_path / "host"]
    for folder in folders:
        folder.mkdir()
    roles.step()
    with roles.actor.on_device(grads=True, optimizer=True, phase="train_actor"):
        snapshots = [roles.actor.save(folders[0])]
    roles.device.generator_turn("rollout")
    roles.device.settle()
    before = roles.device.ledger.look()[0]["actor"]
    assert sum(before.values()) == 0
    snapshots.append(roles.actor.save(folders[1]))
    assert roles.device.ledger.look()[0]["actor"] == before
    planned = RoleStorage("actor", roles.actor.config, 1).checkpoint_bytes(0)
    assert [snapshot.num_bytes for snapshot in snapshots] == [planned] * 2
    following = roles.step()
    roles.device.generator_turn("rollout")
    roles.device.settle()  # the host's buffers hold the next step's bytes
    for snapshot in reversed(snapshots):
        assert snapshot.write()
        snapshot.finish()
    for folder in folders:
        assert_goes_on_alike(roles, folder, following)


def test_what_a_role_that_stays_trains_on_is_not_in_its_checkpoint(model: Path, tmp_path: Path) -> None:
    """Megatron-Core's own plan has no copy of fp32 parameters: each has a storage of its own."""
    roles = Roles(model, *OPTIMIZERS["fp32"], offload=False)
    roles.step()
    snapshot = roles.actor.save(tmp_path)
    following = roles.step()
    assert snapshot.write()
    snapshot.finish()
    assert_goes_on_alike(roles, tmp_path, following)
    roles.close()


def assert_goes_on_alike(roles: Roles, folder: Path, following: list[Tensor]) -> None:
    """Assert that the saved actor takes the step that followed the save."""
    config = roles.actor.config
    other = Roles(Path(config.model.path), config.model.dtype, config.optimizer.distributed)
    with other.actor.on_device(grads=True, optimizer=True, phase="load"):
        other.actor.load(folder)
    with other.actor.on_device(grads=True, optimizer=True, phase="train_actor"):
        loss = other.train(other.actor)
    with other.actor.on_device(phase="weight_sync"):
        weights = [tensor.clone() for _, tensor in other.actor.model.stream_weights()]
    assert torch.equal(loss, following[5])
    assert all(torch.equal(one, two) for one, two in zip(weights, following[6:], strict=True))
    other.close()


def test_a_checkpoint_of_the_other_kind_of_optimizer_is_refused(model: Path, tmp_path: Path) -> None:
    plain, distributed = (Roles(model, Dtype.fp32, kind) for kind in (False, True))
    snapshot = plain.actor.save(tmp_path)
    assert snapshot.write()
    snapshot.finish()
    message = "was written with actor.optimizer.distributed=false, .*; set actor.optimizer.distributed=false"
    turn = distributed.actor.on_device(grads=True, optimizer=True, phase="load")
    with pytest.raises(ValueError, match=message), turn:
        distributed.actor.load(tmp_path)
    for roles in (plain, distributed):
        roles.close()


def test_saving_inside_another_turn_is_an_error(roles: Roles, tmp_path: Path) -> None:
    wrong = pytest.raises(ResidencyError, match="actor: saving inside the turn of critic")
    with roles.critic.on_device(phase="values"), wrong:
        roles.actor.save(tmp_path)


def test_trace_has_every_turn_and_copy(model: Path, tmp_path: Path) -> None:
    trace = TraceRecorder(tmp_path / "trace", every=1)
    roles = Roles(model, Dtype.fp32, False, trace=trace)
    roles.step()
    roles.device.settle()
    roles.device.collect_cost()
    trace.begin(1)
    roles.step()
    roles.device.settle()
    trace.end()
    cost = roles.device.collect_cost()
    roles.close()
    newest = newest_trace(tmp_path)
    assert newest is not None
    assert newest.lanes() == ["trainer", "actor", "critic", "reference", "reward_model", COPY_IN, COPY_OUT]
    turns = {lane: [s.name for s in newest.spans if s.lane == lane] for lane in newest.lanes()}
    assert turns["actor"] == ["old_log_probs", "train_actor", "optimizer step", "weight_sync"]
    assert turns["critic"] == ["values", "train_critic", "optimizer step"]
    assert (turns["reference"], turns["reward_model"]) == (["ref_log_probs"], ["scores"])
    for lane, moved in ((COPY_IN, cost.bytes_in), (COPY_OUT, cost.bytes_out)):
        copies = [s for s in newest.spans if s.lane == lane]
        assert sum(int(s.args["bytes"]) for s in copies) == moved > 0
        assert {"actor moments", "critic moments"} <= {s.name for s in copies}
        assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(copies))  # one at a time
    in_turns = sorted((s for s in newest.spans if s.lane in roles.device.roles), key=lambda s: (s.start, -s.end))
    outer = [s for s in in_turns if s.name != "optimizer step"]
    assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(outer))  # turns do not overlap

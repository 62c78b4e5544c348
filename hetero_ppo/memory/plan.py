"""The memory of a run before the run: device bytes by phase, role and kind, host bytes, and what the turns copy.

Nothing is built and no device is used; of every role's model folder only config.json is read. What the project allocates itself is
counted to the byte; activations are estimated and shown in a column of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hetero_ppo.config.derived import config_reward_models, config_roles, has_servers, passes
from hetero_ppo.config.devices import dtype_of
from hetero_ppo.config.load import AnyConfig
from hetero_ppo.config.schema import PpoConfig, ResidencyConfig
from hetero_ppo.memory.plan_activations import (
    SLICE_ELEMENTS_CPU,
    SLICE_ELEMENTS_GPU,
    Work,
    forward_bytes,
    training_bytes,
)
from hetero_ppo.memory.plan_generator import GeneratorPlan, plan_generator
from hetero_ppo.memory.plan_reserve import Reserve, ReservePart, plan_reserve, server_parts
from hetero_ppo.memory.plan_storage import RoleStorage
from hetero_ppo.step.kinds import OPTIMIZER, TRAINING, Kind
from hetero_ppo.step.phases import GeneratorMemory, Phase, step_phases
from megatron_bridge.weights.parameter_count import hf_tensor_sizes

GIB = 2**30
DEFAULT_RANKS_PER_NODE = 8
#: Kinds with a buffer in host memory: gradients are freed, not copied.
HOST_KINDS = frozenset({Kind.params}) | OPTIMIZER

Bytes = Mapping[str, Mapping[Kind, int]]  # role -> kind -> bytes


@dataclass(frozen=True)
class RolePlan:
    """A role in its layout."""

    name: str
    model: str  # name of the model's folder
    dtype: str
    layout: str  # "TP 2 x PP 1 x DP 4, ZeRO-1"
    parameters: int  # of the Hugging Face model
    parameters_per_rank: int  # of the fullest rank, padding of the vocabulary included
    trained: bool


@dataclass(frozen=True)
class PhasePlan:
    """One phase of a step, on the rank that is fullest in it."""

    phase: str
    computing: str | None  # role that computes; None: the generator, in its own share
    rank: int
    roles: Bytes  # on the device
    activations: int  # estimate, bytes
    ahead: int  # bytes of the next turn that may have come in already, as far as the largest turn leaves room
    generator: int  # the generator's share of the device, bytes
    reserves: Sequence[ReservePart]  # what a CUDA device holds besides tensors; empty on a CPU
    copied_out: int  # bytes to host memory as the phase begins, of the rank that copies most then
    copied_in: int  # bytes from host memory

    @property
    def counted(self) -> int:
        """Bytes that the project allocates itself."""
        return sum(size for kinds in self.roles.values() for size in kinds.values())

    @property
    def reserve(self) -> int:
        """Bytes that a CUDA device holds besides tensors."""
        return sum(part.num_bytes for part in self.reserves)

    @property
    def total(self) -> int:
        return self.counted + self.activations + self.ahead + self.generator + self.reserve

    @property
    def pooled(self) -> int:
        """Bytes that torch's allocator of the trainer has reserved: tensors, workspaces and slack."""
        return (
            self.counted + self.activations + self.ahead + sum(part.num_bytes for part in self.reserves if part.pooled)
        )

    def of_kind(self, kind: Kind) -> int:
        """Return the bytes of a kind, all roles together."""
        return sum(kinds.get(kind, 0) for kinds in self.roles.values())

    def seconds(self, pcie_gb_s: float, *, overlap: bool) -> float:
        """Return the seconds of the copies.

        Args:
            pcie_gb_s: Rate of one direction in 1e9 bytes per second.
            overlap: Whether both directions run in parallel; otherwise one follows the other.
        """
        bytes_waited_for = max(self.copied_in, self.copied_out) if overlap else self.copied_in + self.copied_out
        return bytes_waited_for / (pcie_gb_s * 1e9)


@dataclass(frozen=True)
class HostPlan:
    """Host memory of the fullest node, bytes."""

    pinned: Mapping[str, int]  # role -> buffers for what leaves the device
    weight_files: int  # the generator's weights in shared memory during a sync: the old version and the new one
    generator: int  # the servers' weights and KV cache, on a CPU
    checkpoint: int  # copy of the trained roles that a checkpoint is written from
    loading: int  # the part of a checkpoint that the ranks read at one time; there is no copy then
    device_is_host: int  # what the ranks hold on the device, when the device is the CPU

    @property
    def total(self) -> int:
        checkpoint = max(self.checkpoint, self.loading)
        return sum(self.pinned.values()) + self.weight_files + self.generator + checkpoint + self.device_is_host


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a run: by phase on a device, and on a host."""

    kind: str  # "sft", "rm" or "ppo"
    world_size: int
    ranks_per_node: int
    roles: Sequence[RolePlan]
    phases: Sequence[PhasePlan]
    host: HostPlan
    generator: GeneratorPlan | None
    device_bytes: int | None  # of one device; None: a CPU, without a limit of its own
    residency: ResidencyConfig | None  # None: the run has no turns

    @property
    def peak(self) -> PhasePlan:
        """The phase that needs most of a device."""
        return max(self.phases, key=lambda phase: phase.total)


def plan_memory(
    config: AnyConfig,
    world_size: int,
    *,
    ranks_per_node: int | None = None,
    device_bytes: int | None = None,
    rank: int | None = None,
) -> MemoryPlan:
    """Return the memory plan of a run.

    Args:
        config: Checked configuration of the run.
        world_size: Number of ranks of the run.
        ranks_per_node: Number of ranks of a node; None: ``DEFAULT_RANKS_PER_NODE``, or fewer where the world is smaller.
        device_bytes: Memory of one device; None: a CPU.
        rank: The only rank to plan; None: in every phase, the rank that is fullest in it.

    Raises:
        ValueError: A config.json is missing or not supported, or a layout does not fit model or world.
    """
    on_cpu = device_bytes is None
    roles = {name: RoleStorage(name, role, world_size, on_cpu=on_cpu) for name, role in config_roles(config).items()}
    residency = config.residency
    ranks = range(world_size) if rank is None else [rank]
    steps = _phases(step_phases(config), residency, roles)
    ranks_per_node = ranks_per_node or min(world_size, DEFAULT_RANKS_PER_NODE)
    generator = None
    if isinstance(config, PpoConfig):
        generator = plan_generator(config, roles["actor"], device_bytes, world_size, ranks_per_node)
    copies = {number: _copies(steps, roles, number) for number in ranks}
    reserve = Reserve()
    if not on_cpu:
        experts = any(role.bridge.transformer.num_moe_experts for role in roles.values())
        servers: Sequence[ReservePart] = ()
        if isinstance(config, PpoConfig) and has_servers(config):
            one_node = world_size <= ranks_per_node
            servers = server_parts(config.rollout, config.memory, world_size, one_node=one_node)
        reserve = plan_reserve(config.memory, config_roles(config), world_size, has_experts=experts, servers=servers)
    planner = _PhasePlanner(config, steps, roles, generator, reserve, on_cpu=on_cpu)
    phases = []
    for index in range(len(steps)):
        fullest = max((planner.plan(index, number) for number in ranks), key=lambda phase: phase.total)
        out, back = max((copies[number][index] for number in ranks), key=sum)
        phases.append(PhasePlan(**{**vars(fullest), "copied_out": out, "copied_in": back}))
    host = _plan_host(roles, residency, generator, phases, world_size, ranks_per_node, on_cpu=on_cpu)
    return MemoryPlan(
        kind=config.kind,
        world_size=world_size,
        ranks_per_node=ranks_per_node,
        roles=[_describe(role) for role in roles.values()],
        phases=phases,
        host=host,
        generator=generator,
        device_bytes=device_bytes,
        residency=residency,
    )


def _phases(phases: list[Phase], residency: ResidencyConfig | None, roles: Mapping[str, RoleStorage]) -> list[Phase]:
    """Return the phases of a step with what they hold: without offloading, every role is on the device in all of them."""
    if residency is None or residency.offload:
        return phases
    return [replace(phase, needs=dict.fromkeys(roles, TRAINING)) for phase in phases]


def _copies(phases: Sequence[Phase], roles: Mapping[str, RoleStorage], rank: int) -> list[tuple[int, int]]:
    """Return (bytes out, bytes in) of a rank as every phase begins, in the steady state of many steps.

    What was not written since it came in is dropped, not copied: parameters after a forward. Gradients are never copied.
    """
    held = {name: role.bytes_by_kind(rank) for name, role in roles.items()}
    written: set[tuple[str, Kind]] = set()
    copies: list[tuple[int, int]] = []
    for phase, before in zip([*phases, *phases], [phases[-1], *phases, *phases[:-1]], strict=True):
        now = {(name, kind) for name, kinds in phase.needs.items() for kind in kinds & HOST_KINDS}
        then = {(name, kind) for name, kinds in before.needs.items() for kind in kinds & HOST_KINDS}
        out = sum(held[name].get(kind, 0) for name, kind in (then - now) & written)
        back = sum(held[name].get(kind, 0) for name, kind in now - then)
        copies.append((out, back))
        written -= then - now
        written |= {(name, kind) for name, kind in now if phase.needs[name] == TRAINING}
    return copies[len(phases) :]


class _PhasePlanner:
    """Device bytes of a phase on a rank."""

    def __init__(
        self,
        config: AnyConfig,
        phases: Sequence[Phase],
        roles: Mapping[str, RoleStorage],
        generator: GeneratorPlan | None,
        reserve: Reserve,
        *,
        on_cpu: bool,
    ) -> None:
        self.config = config
        self.phases = phases
        self.roles = roles
        self.generator = generator
        self.reserve = reserve
        self.on_cpu = on_cpu
        residency = config.residency
        self.comes_ahead = residency is not None and residency.offload and residency.overlap
        self._activations: dict[tuple[str, int], int] = {}

    def plan(self, index: int, rank: int) -> PhasePlan:
        phase = self.phases[index]
        holds, generator = phase.generator, 0
        if self.generator is not None and (holds is GeneratorMemory.everything or not self.generator.sleeps):
            generator = self.generator.awake
        elif self.generator is not None and holds is GeneratorMemory.weights and self.generator.awake:
            generator = self.generator.weights
        ahead = self._ahead(index, rank) if self.comes_ahead else 0
        is_last_stage = phase.is_concurrent and not self._next(index).is_concurrent
        if self.generator is not None and self.generator.sleeps and is_last_stage:
            # While the generator is awake the next wave begins with this stage, and in the last wave the generator sleeps.
            generator, ahead = (generator, 0) if generator >= ahead else (0, ahead)
        activations = 0 if phase.role is None else self._activations_of(phase, self.roles[phase.role], rank)
        syncing = self.generator is not None and self.generator.sleeps and holds is GeneratorMemory.weights
        reserves = self.reserve.of_phase(
            self._held(phase, rank) + activations + ahead,
            generator_awake=generator > 0 and not syncing,
            syncing=syncing,
        )
        return PhasePlan(
            phase=phase.name,
            computing=phase.role,
            rank=rank,
            roles=self._resident(phase, rank),
            activations=activations,
            ahead=ahead,
            generator=generator,
            reserves=reserves,
            copied_out=0,
            copied_in=0,
        )

    def _resident(self, phase: Phase, rank: int) -> dict[str, dict[Kind, int]]:
        held = {name: self.roles[name].bytes_by_kind(rank) for name in phase.needs}
        return {
            name: {kind: held[name][kind] for kind in Kind if kind in kinds and kind in held[name]}
            for name, kinds in phase.needs.items()
        }

    def _ahead(self, index: int, rank: int) -> int:
        """Return the bytes of the next turn that ``engines.shared_device`` lets come in during this one.

        Roles never hold more than in their largest turn.
        """
        phase, following = self.phases[index], self._next(index)
        missing = sum(
            self.roles[name].bytes_by_kind(rank).get(kind, 0)
            for name, kinds in following.needs.items()
            for kind in kinds - phase.needs.get(name, frozenset())
        )
        return min(missing, max(self._held(other, rank) for other in self.phases) - self._held(phase, rank))

    def _next(self, index: int) -> Phase:
        return self.phases[(index + 1) % len(self.phases)]

    def _held(self, phase: Phase, rank: int) -> int:
        return sum(size for kinds in self._resident(phase, rank).values() for size in kinds.values())

    def _activations_of(self, phase: Phase, role: RoleStorage, rank: int) -> int:
        pp_rank = role.place(rank).pp_rank
        if (phase.name, pp_rank) not in self._activations:
            self._activations[phase.name, pp_rank] = self._estimate(phase, role, pp_rank)
        return self._activations[phase.name, pp_rank]

    def _estimate(self, phase: Phase, role: RoleStorage, pp_rank: int) -> int:
        if phase.generator is GeneratorMemory.weights:
            return _gathered_bytes(role) + (0 if self.generator is None else self.generator.sync_buckets)
        work = role_work(self.config, role, training=phase.is_training, on_cpu=self.on_cpu)
        if phase.is_training:
            return training_bytes(role.bridge, role.head, role.spec.trained_config.recompute, pp_rank, work)
        return forward_bytes(role.bridge, role.head, pp_rank, work)


def role_work(config: AnyConfig, role: RoleStorage, *, training: bool, on_cpu: bool) -> Work:
    """Return the largest micro-batch of a role, and the number of micro-batches on one rank."""
    size = role.config.micro_batch_size
    if isinstance(config, PpoConfig):
        algorithm, sampling = config.algorithm, config.rollout
        per_rank = algorithm.rollout_batch_size * algorithm.samples_per_prompt / role.dp_size
        answer = max(sampling.sampling.max_tokens, sampling.eval_sampling.max_tokens)
        if training:
            per_rank = passes(algorithm, role.name).minibatch_size / role.dp_size
            answer = sampling.sampling.max_tokens
        length = config.data.max_prompt_tokens + answer
        reward_model = config_reward_models(config).get(role.name)
        if reward_model is not None and reward_model.re_encode is not None:
            length = reward_model.re_encode.max_tokens
    else:
        per_rank, length = config.train.global_batch_size / role.dp_size, config.data.max_sequence_tokens
    slice_elements = SLICE_ELEMENTS_CPU if on_cpu else SLICE_ELEMENTS_GPU
    tokens = role.config.micro_batch_tokens
    if role.spec.is_trained and not training:
        tokens = role.spec.trained_config.forward_micro_batch_tokens or tokens
    per_row = config.data.sequences_per_row
    if tokens is not None:
        # As one row: what counts is the sum of tokens, however many rows have it.
        most = max(1, math.ceil(per_rank)) * length * per_row
        return Work(1, max(length, min(tokens, most)), max(1, math.ceil(most / tokens)), slice_elements, not on_cpu)
    size = max(1, size // per_row)
    rows = max(1, min(size, math.ceil(per_rank)))
    return Work(per_row * rows, length, max(1, math.ceil(per_rank / size)), slice_elements, not on_cpu)


def _gathered_bytes(role: RoleStorage) -> int:
    """Return the bytes that ``stream_hf`` holds of the largest tensor: the shards, and the tensor that they are joined to."""
    largest = max(hf_tensor_sizes(role.bridge, role.head).values()) * role.element_bytes
    parallel = role.config.parallel
    if parallel.tensor > 1:
        return 2 * largest
    return largest if parallel.pipeline > 1 else 0


def _plan_host(
    roles: Mapping[str, RoleStorage],
    residency: ResidencyConfig | None,
    generator: GeneratorPlan | None,
    phases: Sequence[PhasePlan],
    world_size: int,
    ranks_per_node: int,
    *,
    on_cpu: bool,
) -> HostPlan:
    nodes = [range(start, min(start + ranks_per_node, world_size)) for start in range(0, world_size, ranks_per_node)]
    pinned: dict[str, int] = {}
    if residency is not None and residency.offload:
        by_node = [{name: _host_bytes(role, node) for name, role in roles.items()} for node in nodes]
        pinned = max(by_node, key=lambda sizes: sum(sizes.values()))
    fullest = max(phase.total for phase in phases)
    trained = [role for role in roles.values() if role.spec.is_trained]
    return HostPlan(
        pinned=pinned,
        weight_files=0 if generator is None else generator.weight_files,
        generator=generator.host_bytes if generator is not None and on_cpu else 0,
        checkpoint=max(sum(role.checkpoint_bytes(rank) for rank in node for role in trained) for node in nodes),
        loading=max(sum(max(role.loading_bytes(rank) for role in trained) for rank in node) for node in nodes),
        device_is_host=fullest * len(nodes[0]) if on_cpu else 0,
    )


def _host_bytes(role: RoleStorage, ranks: Sequence[int]) -> int:
    return sum(size for rank in ranks for kind, size in role.bytes_by_kind(rank).items() if kind in HOST_KINDS)


def _describe(role: RoleStorage) -> RolePlan:
    per_rank = max(sum(p.numel for chunk in stage for p in chunk) for stage in role.parameters)
    return RolePlan(
        name=role.name,
        model=Path(role.config.model.path).resolve().name,
        dtype=dtype_of(role.config.model).value,
        layout=describe_layout(role),
        parameters=sum(hf_tensor_sizes(role.bridge, role.head).values()),
        parameters_per_rank=per_rank,
        trained=role.spec.is_trained,
    )


def describe_layout(role: RoleStorage) -> str:
    """Return the axes with more than one rank, and what is sharded or recomputed, such as "TP 2 x DP 4, ZeRO-1"."""
    parallel = role.config.parallel
    axes = {
        "TP": parallel.tensor,
        "CP": parallel.context,
        "EP": parallel.expert,
        "PP": parallel.pipeline,
        "DP": role.dp_size,
    }
    words = [" x ".join(f"{name} {size}" for name, size in axes.items() if size > 1) or "one rank"]
    if parallel.virtual_pipeline is not None:
        words.append(f"{parallel.virtual_pipeline} chunks a stage")
    if parallel.sequence:
        words.append("SP")
    if role.spec.is_trained:
        trained = role.spec.trained_config
        words += ["ZeRO-1"] if trained.optimizer.distributed else []
        words += [f"{trained.recompute} recompute"] if trained.recompute is not None else []
    return ", ".join(words)

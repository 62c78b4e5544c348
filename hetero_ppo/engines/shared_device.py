"""The device that all roles share and take turns on.

For a turn, a role's bytes are copied to the device and those of other roles leave it. Two lanes copy at the same time, one in each
direction. A block comes in as soon as enough memory is free, so that the device never holds more than its largest turn. While one
turn computes, the bytes of the next turn in the schedule are copied to the device, as far as they fit.

At the end of a turn its role is guarded, but its bytes stay until another turn begins. Two successive turns of one role move
nothing.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from hetero_ppo.config.schema import ResidencyConfig
from hetero_ppo.engines.residency import Block, ResidencyError, RoleResidency
from hetero_ppo.memory.ledger import Ledger, RoleBytes
from hetero_ppo.observability.trace import COPY_IN, COPY_OUT, TRAINER, WAIT, Args, TraceRecorder
from hetero_ppo.step.kinds import FORWARD, Kind
from hetero_ppo.step.phases import Phase
from megatron_bridge.platform.copies import CopyLane, allocated_bytes, computation_done, reserved_bytes

#: Kinds that are on the device before a turn computes. ``require`` waits for the optimizer's bytes before the optimizer step.
FIRST = frozenset({Kind.params, Kind.grads})


#: Most bytes of a group of blocks that move together; a group is also at most 1/GROUPS_OF_A_TURN of the largest turn. For single
#: blocks, Python takes as long as the copies. With one large group, nothing could come in before everything has left.
GROUP_BYTES = 32 * 2**20
GROUPS_OF_A_TURN = 16


@dataclass
class SwitchCost:
    """Cost of switches since the last ``collect_cost``."""

    waited_s: float = 0.0  # time for which the computation waited
    bytes_in: int = 0  # bytes copied to the device
    bytes_out: int = 0  # bytes copied to the host


class SharedDevice:
    """The roles of a rank, their turns, and the lanes that copy between device and host memory."""

    def __init__(
        self, config: ResidencyConfig, schedule: Sequence[Phase] = (), trace: TraceRecorder | None = None
    ) -> None:
        """Args:
        config: Settings that decide whether roles leave the device, and whether copies overlap with computation.
        schedule: Phases of a step, which tell the next turn. With an empty schedule nothing is copied ahead.
        trace: Recorder, which gets a lane for each role and for each direction of copies.
        """
        self.trace = trace or TraceRecorder()
        self.offload = config.offload
        self.overlap = config.overlap
        self.schedule = list(schedule)
        self.roles: dict[str, RoleResidency] = {}
        self.ledger = Ledger(self._look, allocated_bytes, reserved_bytes)
        self.peak_bytes = 0  # most bytes that the roles have held at one time, switches included
        self.limit = 0  # bytes of the largest turn
        self._in_use = 0
        self._turn: tuple[str, str] | None = None  # role and phase of the open turn
        self._generator_phase: tuple[str, Mapping[str, frozenset[Kind]]] | None = (
            None  # phase of the generator, and the kinds that stay on the device in it
        )
        self._changed = threading.Condition()
        self._cost = SwitchCost()
        self._lanes = (CopyLane("residency-in"), CopyLane("residency-out")) if config.offload else None

    # --- roles ---

    def add(self, residency: RoleResidency) -> None:
        """Add a role that was just built, with all its bytes on the device. With offload they leave at once, before the next role is built."""
        assert residency.role not in self.roles, f"{residency.role} is there already"
        self.roles[residency.role] = residency
        with self._changed:
            self._use(residency.num_bytes(frozenset(Kind)))
        self._raise_limit({residency.role: residency.kinds & FORWARD})
        for scheduled in self.schedule:
            self._raise_limit(scheduled.needs)
        if self.offload:
            residency.pin()
            residency.guard()
            self._send_out([b for b in residency.blocks])
            self.settle()

    def remove(self, role: str) -> None:
        """Forget a role that was added and will not be used. Its memory is freed with its engine.

        Raises:
            ResidencyError: A turn is open.
        """
        if self._turn is not None:
            raise ResidencyError(f"{role}: it is removed inside the turn of {self._turn[0]} in phase {self._turn[1]!r}")
        self.settle()
        residency = self.roles.pop(role)
        with self._changed:
            self._use(-sum(block.num_bytes for block in residency.blocks if block.on_device))
            self.limit = 0
        residency.unguard()
        residency.unpin()
        for other in self.roles.values():
            self._raise_limit({other.role: other.kinds & FORWARD})
        for scheduled in self.schedule:
            self._raise_limit(scheduled.needs)

    def _raise_limit(self, resident: Mapping[str, frozenset[Kind]]) -> None:
        with self._changed:
            self.limit = max(self.limit, self._bytes(resident))
            self._changed.notify_all()

    # --- turns ---

    @contextlib.contextmanager
    def turn(
        self, role: str, kinds: frozenset[Kind], phase: str, then: Mapping[str, frozenset[Kind]] | None = None
    ) -> Iterator[None]:
        """Hold a role's bytes on the device while the body computes.

        Args:
            role: Name of a role that was added.
            kinds: Kinds that the body needs. Optimizer bytes may still be copied when it begins: ``require`` waits for them.
            phase: Name of the phase, for messages, the ledger and the place in the schedule.
            then: Kinds of each role that the next turn needs and that may be copied during this one. None takes them from the schedule.

        Raises:
            ResidencyError: Another turn is open.
        """
        residency = self.roles[role]
        if self._turn is not None:
            raise ResidencyError(
                f"{role}: phase {phase!r} begins inside the turn of {self._turn[0]} in phase {self._turn[1]!r}; turns do not nest"
            )
        residency.phase = phase
        kinds = kinds & residency.kinds
        self._turn = (role, phase)
        try:
            self._switch({role: kinds}, phase, self._next_turn(phase) if then is None else then)
            self._wait([b for b in residency.blocks if b.kind in kinds & FIRST])
            self.ledger.record(phase, "after")
            residency.unguard()
            with self.trace.span(role, phase):
                yield
        finally:
            residency.leave()
            self._note_computed(phase, {role: kinds})
            self._turn = None
            if self.offload:
                residency.guard()
                if not self.overlap:
                    self._send_out(residency.blocks)
                    self.settle()

    def generator_turn(self, phase: str, *, ahead: bool = True) -> None:
        """Move off the device all bytes that the schedule does not keep there in ``phase``, before the generator takes its memory.

        Args:
            phase: Name of the generator's phase.
            ahead: Whether the next turn's bytes may be copied during the phase. If not, all moves are finished on return.

        Raises:
            ResidencyError: A turn is open.
        """
        if self._turn is not None:
            raise ResidencyError(
                f"phase {phase!r} begins inside the turn of {self._turn[0]} in phase {self._turn[1]!r}; turns do not nest"
            )
        resident: Mapping[str, frozenset[Kind]] = {}
        for scheduled in self.schedule:
            if scheduled.name == phase:
                resident = scheduled.needs
        self._switch(resident, phase, self._next_turn(phase) if ahead else {})
        self.wait_for_room()
        if not ahead:
            self.settle()
        self._generator_phase = (phase, resident)

    def wait_for_room(self) -> None:
        """Wait until all blocks that have to leave the device have left it."""
        for residency in self.roles.values():
            self._wait([block for block in residency.blocks if not block.is_target])

    def require(self, role: str, kinds: frozenset[Kind], what: str) -> None:
        """Wait until the role's bytes of these kinds are on the device.

        Args:
            role: Name of a role that was added.
            kinds: Kinds to wait for.
            what: Name of the caller's work, for the error.

        Raises:
            ResidencyError: The role has no turn, or its turn does not include these kinds.
        """
        residency = self.roles[role]
        blocks = [block for block in residency.blocks if block.kind in kinds]
        in_turn = self._turn is not None and self._turn[0] == role
        if (self.offload and not in_turn) or not all(block.is_target for block in blocks):
            raise residency.error(f"{what} needs its {', '.join(sorted(kind.value for kind in kinds))} on the device")
        self._wait(blocks)

    @contextlib.contextmanager
    def for_saving(self, role: str) -> Iterator[None]:
        """Make a role's tensors readable in the body: on the device during its turn, otherwise in host memory."""
        if not self.offload or (self._turn is not None and self._turn[0] == role):
            if self._turn is not None:
                self._wait(self.roles[role].blocks)
            yield
            return
        if self._turn is not None:
            raise self.roles[role].error(f"saving inside the turn of {self._turn[0]}")
        self.settle()
        for block in self.roles[role].blocks:
            assert block.kind is Kind.grads or block.on_device or not block.is_dirty, "left without a copy"
        with self.roles[role].on_host():
            yield

    # --- switches ---

    def _switch(self, resident: Mapping[str, frozenset[Kind]], phase: str, then: Mapping[str, frozenset[Kind]]) -> None:
        """Queue the moves that bring the ``resident`` kinds to the device, and then those of the next turn (``then``)."""
        if self._generator_phase is not None:  # its bytes came in while the generator worked, or are still being copied
            for role, kinds in self._generator_phase[1].items():
                self._wait([b for b in self.roles[role].blocks if b.kind in kinds] if role in self.roles else [])
            self._note_computed(*self._generator_phase)
            self._generator_phase = None
        if not self.offload:
            return
        self._raise_limit(resident)
        ahead = then if self.overlap else {}
        self.ledger.record(phase, "before")
        self._send_out(self._leaving(resident, ahead))
        for needs in (resident, ahead):
            for name, kinds in needs.items():
                self._bring_in(name, [block for block in self.roles[name].blocks if block.kind in kinds])
        if not self.overlap:
            self.settle()

    def _leaving(self, resident: Mapping[str, frozenset[Kind]], ahead: Mapping[str, frozenset[Kind]]) -> list[Block]:
        """Return the blocks that have to leave for ``resident``. Blocks that the next turn needs stay, as far as they fit too."""
        room = self.limit - self._bytes(resident)
        leaving = []
        for name, residency in self.roles.items():
            for block in residency.blocks:
                if block.kind in resident.get(name, frozenset()) or not block.is_target:
                    continue
                if block.kind in ahead.get(name, frozenset()) and block.num_bytes <= room:
                    room -= block.num_bytes
                else:
                    leaving.append(block)
        return leaving

    def _bytes(self, resident: Mapping[str, frozenset[Kind]]) -> int:
        return sum(self.roles[role].num_bytes(kinds) for role, kinds in resident.items() if role in self.roles)

    def _next_turn(self, phase: str) -> Mapping[str, frozenset[Kind]]:
        for index, scheduled in enumerate(self.schedule):
            if scheduled.name == phase:
                following = self.schedule[(index + 1) % len(self.schedule)].needs
                return {role: kinds for role, kinds in following.items() if role in self.roles}
        return {}

    def _send_out(self, blocks: Sequence[Block]) -> None:
        owner = {id(block): residency for residency in self.roles.values() for block in residency.blocks}
        done = computation_done()
        waiting = _Groups(self._group_bytes)
        with self._changed:
            going = [block for block in blocks if block.is_target]
            for block in going:
                block.is_target = False
            self._changed.notify_all()  # a block of these that waits for free memory to come in gives up
        # Gradients go first: they are released without a copy. Blocks that are still queued to come in go last: they may be queued
        # behind blocks that wait for the memory which the others free.
        for block in sorted(
            going, key=lambda b: (b.moving is not None and not b.moving.done(), b.kind is not Kind.grads)
        ):
            waiting.add(owner[id(block)], block)
        for residency, group in waiting.take():
            self._queue_out(residency, group, done)

    def _queue_out(self, residency: RoleResidency, blocks: Sequence[Block], computed: Callable[[], None]) -> None:
        assert self._lanes is not None
        lane, before = self._lanes[1], _moves_of(blocks)

        def task() -> None:
            # A block that still waits to come in gives up. To wait for its move could be a deadlock: the move may be queued behind
            # one that needs the memory which this lane frees.
            with self._changed:
                self._changed.wait_for(lambda: not any(block.arriving for block in blocks))
            for move in before:
                if move.done():
                    move.result()  # raises the error of the move, if it had one
            leaving = [block for block in blocks if block.on_device]
            if not leaving:
                return
            computed()
            with self._traced(COPY_OUT, residency, leaving) as args:
                copied = residency.move_out(leaving, lane)
                args["bytes"] = copied
            with self._changed:
                self._cost.bytes_out += copied
                self._use(-sum(block.num_bytes for block in leaving))

        _set_moves(blocks, lane.submit(task))

    def _bring_in(self, role: str, blocks: Sequence[Block]) -> None:
        coming = [block for block in blocks if not block.is_target]
        order = (Kind.params, Kind.grads, Kind.main_params, Kind.moments)
        waiting = _Groups(self._group_bytes)
        for block in sorted(coming, key=lambda b: order.index(b.kind)):
            block.is_target = True
            waiting.add(self.roles[role], block)
        for residency, group in waiting.take():
            self._queue_in(residency, group)

    def _queue_in(self, residency: RoleResidency, blocks: Sequence[Block]) -> None:
        assert self._lanes is not None
        lane, before = self._lanes[0], _moves_of(blocks)

        def coming() -> list[Block]:
            return [block for block in blocks if block.is_target and not block.on_device]

        def task() -> None:
            for move in before:
                move.result()
            with self._changed:
                self._changed.wait_for(lambda: self._in_use + sum(b.num_bytes for b in coming()) <= self.limit)
                admitted = coming()
                if not admitted:
                    return
                for block in admitted:
                    block.arriving = True
                self._use(sum(block.num_bytes for block in admitted))
            try:
                with self._traced(COPY_IN, residency, admitted) as args:
                    copied = residency.move_in(admitted, lane)
                    args["bytes"] = copied
            finally:
                with self._changed:
                    for block in admitted:
                        block.arriving = False
                    self._changed.notify_all()
            with self._changed:
                self._cost.bytes_in += copied

        _set_moves(blocks, lane.submit(task))

    @property
    def _group_bytes(self) -> int:
        return min(GROUP_BYTES, self.limit // GROUPS_OF_A_TURN)

    def _traced(
        self, lane: str, residency: RoleResidency, blocks: Sequence[Block]
    ) -> contextlib.AbstractContextManager[Args]:
        kind = blocks[0].kind.value
        return self.trace.span(
            lane, f"{residency.role} {kind}", role=residency.role, kind=kind, bytes=0, blocks=len(blocks)
        )

    def _use(self, num_bytes: int) -> None:
        """Add to the bytes in use; the caller holds the condition ``_changed``."""
        self._in_use += num_bytes
        self.peak_bytes = max(self.peak_bytes, self._in_use)
        self._changed.notify_all()

    def _wait(self, blocks: Sequence[Block]) -> None:
        """Wait until the last move of each block is done, and count the time."""
        pending = _moves_of(blocks)
        if not pending:
            return
        start = time.perf_counter()
        for move in reversed(pending):  # last move first: the thread wakes up once, when the others are done
            move.result()
        end = time.perf_counter()
        self._cost.waited_s += end - start
        self.trace.add(TRAINER, WAIT, start, end)
        for block in blocks:
            block.moving = None

    def settle(self) -> None:
        """Wait until nothing moves, and check that the storages hold as many bytes as were counted."""
        for residency in self.roles.values():
            self._wait(residency.blocks)
        device, _ = self._look()
        held = sum(sum(kinds.values()) for kinds in device.values())
        assert held == self._in_use, f"the roles hold {held} bytes of device memory, accounted are {self._in_use}"

    # --- costs, and bytes that are held ---

    def collect_cost(self) -> SwitchCost:
        """Return the cost since the last call, and begin again at zero."""
        with self._changed:
            cost, self._cost = self._cost, SwitchCost()
        return cost

    def _look(self) -> tuple[RoleBytes, RoleBytes]:
        held = {name: residency.bytes_by_kind() for name, residency in self.roles.items()}
        return {name: device for name, (device, _) in held.items()}, {name: host for name, (_, host) in held.items()}

    def _note_computed(self, phase: str, resident: Mapping[str, frozenset[Kind]]) -> None:
        if not self.offload:
            resident = {role: residency.kinds for role, residency in self.roles.items()}
        held: dict[str, dict[Kind, int]] = {}
        for role, kinds in resident.items():
            if role in self.roles:
                device, _ = self.roles[role].bytes_by_kind()
                held[role] = {kind: num_bytes for kind, num_bytes in device.items() if kind in kinds}
        self.ledger.computed(phase, held)

    def close(self) -> None:
        """End the lanes and give the host buffers back."""
        if self._lanes is not None:
            with self._changed:
                for residency in self.roles.values():
                    for block in residency.blocks:
                        block.is_target = block.is_target and block.on_device
                self._changed.notify_all()
            for lane in self._lanes:
                lane.close()
        for residency in self.roles.values():
            residency.unpin()


class _Groups:
    """Blocks of one role and kind that move together, in the order in which they were added."""

    def __init__(self, num_bytes: int) -> None:
        """Args:
        num_bytes: Most bytes of a group. A block that is larger is a group of its own.
        """
        self._limit = num_bytes
        self._size = 0  # bytes of the last group
        self._groups: list[tuple[RoleResidency, list[Block]]] = []

    def add(self, residency: RoleResidency, block: Block) -> None:
        if self._groups:
            owner, blocks = self._groups[-1]
            fits = self._size + block.num_bytes <= self._limit
            if owner is residency and blocks[0].kind is block.kind and fits:
                blocks.append(block)
                self._size += block.num_bytes
                return
        self._size = block.num_bytes
        self._groups.append((residency, [block]))

    def take(self) -> list[tuple[RoleResidency, list[Block]]]:
        return self._groups


def _moves_of(blocks: Sequence[Block]) -> list[Future[None]]:
    """Return the last moves that were queued for these blocks, each once."""
    return list({id(block.moving): block.moving for block in blocks if block.moving is not None}.values())


def _set_moves(blocks: Sequence[Block], move: Future[None]) -> None:
    for block in blocks:
        block.moving = move

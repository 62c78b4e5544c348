"""The device that all roles share and take turns on.

A turn makes a role's bytes come in and everybody else's leave. What leaves and what comes travels on two lanes at once: a
block comes in as soon as what has left makes room for it, so that the device never holds more than its largest turn. The next
turn of the schedule begins to come in while this one computes, as far as there is room.

Leaving is lazy: at the end of a turn its role is guarded, and its bytes go when another turn begins. Two turns of one role in
a row move nothing.
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

#: A turn begins to compute with these there; the optimizer's bytes are waited for when it steps.
FIRST = frozenset({Kind.params, Kind.grads})


#: Blocks move in groups of about this size, or of a share of the largest turn where that is less: one by one, hundreds of small
#: tensors cost as much in Python as their copies take; all at once, nothing would come in before all has left.
GROUP_BYTES = 32 * 2**20
GROUPS_OF_A_TURN = 16


@dataclass
class SwitchCost:
    """What switching cost since the last ``collect``."""

    waited_s: float = 0.0  # the computation stood still
    bytes_in: int = 0  # copied to the device
    bytes_out: int = 0  # copied to the host


class SharedDevice:
    """Roles, their turns, and the lanes between device and host memory."""

    def __init__(
        self, config: ResidencyConfig, schedule: Sequence[Phase] = (), trace: TraceRecorder | None = None
    ) -> None:
        """Args:
        config: whether roles leave, and whether switches overlap.
        schedule: Phases of a step, for what comes in ahead; empty: nothing does.
        trace: takes a lane for each role and each direction of copies.
        """
        self.trace = trace or TraceRecorder()
        self.offload = config.offload
        self.overlap = config.overlap
        self.schedule = list(schedule)
        self.roles: dict[str, RoleResidency] = {}
        self.ledger = Ledger(self._look, allocated_bytes, reserved_bytes)
        self.peak_bytes = 0  # of what the roles hold, switches included
        self.limit = 0  # bytes of the largest turn
        self._in_use = 0
        self._turn: tuple[str, str] | None = None  # (role, phase) that computes
        self._generator_phase: tuple[str, Mapping[str, frozenset[Kind]]] | None = (
            None  # the generator works, and what stays
        )
        self._changed = threading.Condition()
        self._cost = SwitchCost()
        self._lanes = (CopyLane("residency-in"), CopyLane("residency-out")) if config.offload else None

    # --- roles ---

    def add(self, residency: RoleResidency) -> None:
        """A role that was just built, all of it on the device. With offload it leaves before the next one is built."""
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
        """Forget a role that was added and will not be used; its bytes go with its engine.

        Raises:
            ResidencyError: a turn is open.
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
            role: a role that was added.
            kinds: what the body needs. Optimizer bytes may still be on their way in: ``require`` waits for them.
            phase: name of the phase, for messages, the ledger and the place in the schedule.
            then: what the turn after this one will hold, and may come in during it; None: as the schedule says.

        Raises:
            ResidencyError: another turn is open.
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
        """Move everything off the device but what the schedule keeps there in ``phase``, before the generator takes its memory.

        Args:
            phase: Name of the generator's phase.
            ahead: False: nothing of the next turn comes in, and nothing moves when this returns.

        Raises:
            ResidencyError: a turn is open.
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
        """Stand still until everything that is on its way out has left."""
        for residency in self.roles.values():
            self._wait([block for block in residency.blocks if not block.wanted])

    def require(self, role: str, kinds: frozenset[Kind], what: str) -> None:
        """Wait until these bytes of the role are there.

        Raises:
            ResidencyError: the role's turn did not ask for them, or it has none.
        """
        residency = self.roles[role]
        blocks = [block for block in residency.blocks if block.kind in kinds]
        in_turn = self._turn is not None and self._turn[0] == role
        if (self.offload and not in_turn) or not all(block.wanted for block in blocks):
            raise residency.error(f"{what} needs its {', '.join(sorted(kind.value for kind in kinds))} on the device")
        self._wait(blocks)

    @contextlib.contextmanager
    def for_saving(self, role: str) -> Iterator[None]:
        """A role's tensors readable where they are: on the device in its turn, in host memory outside of one."""
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
        """Queue everything that makes ``resident`` true, and after it what the next turn will want."""
        if self._generator_phase is not None:  # its bytes came in while the engine was at work, or still do
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
        for wanted in (resident, ahead):
            for name, kinds in wanted.items():
                self._bring_in(name, [block for block in self.roles[name].blocks if block.kind in kinds])
        if not self.overlap:
            self.settle()

    def _leaving(self, resident: Mapping[str, frozenset[Kind]], ahead: Mapping[str, frozenset[Kind]]) -> list[Block]:
        """What makes room for ``resident``. Blocks of the turn ahead stay where they are as far as they fit beside it."""
        room = self.limit - self._bytes(resident)
        leaving = []
        for name, residency in self.roles.items():
            for block in residency.blocks:
                if block.kind in resident.get(name, frozenset()) or not block.wanted:
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
            going = [block for block in blocks if block.wanted]
            for block in going:
                block.wanted = False
            self._changed.notify_all()  # one that waits for room to come in gives up
        # Gradients make room at once, being released without a copy. What is still on its way in goes last: it may be queued behind
        # blocks that wait for the room which the others leave.
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
            # A block that still waits for room gives up. Its move is not waited for: it may stand behind one that wants the very
            # room which this lane makes.
            with self._changed:
                self._changed.wait_for(lambda: not any(block.arriving for block in blocks))
            for move in before:
                if move.done():
                    move.result()  # raises what went wrong in it
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
        coming = [block for block in blocks if not block.wanted]
        order = (Kind.params, Kind.grads, Kind.main_params, Kind.moments)
        waiting = _Groups(self._group_bytes)
        for block in sorted(coming, key=lambda b: order.index(b.kind)):
            block.wanted = True
            waiting.add(self.roles[role], block)
        for residency, group in waiting.take():
            self._queue_in(residency, group)

    def _queue_in(self, residency: RoleResidency, blocks: Sequence[Block]) -> None:
        assert self._lanes is not None
        lane, before = self._lanes[0], _moves_of(blocks)

        def coming() -> list[Block]:
            return [block for block in blocks if block.wanted and not block.on_device]

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
        """Account; the caller holds the condition."""
        self._in_use += num_bytes
        self.peak_bytes = max(self.peak_bytes, self._in_use)
        self._changed.notify_all()

    def _wait(self, blocks: Sequence[Block]) -> None:
        """Let the caller stand still until the last move of each block is done."""
        pending = _moves_of(blocks)
        if not pending:
            return
        start = time.perf_counter()
        for move in reversed(pending):  # the last one first: each wait is one wake-up, and the others are done by then
            move.result()
        end = time.perf_counter()
        self._cost.waited_s += end - start
        self.trace.add(TRAINER, WAIT, start, end)
        for block in blocks:
            block.moving = None

    def settle(self) -> None:
        """Wait until nothing moves, and check that the storages are what was accounted."""
        for residency in self.roles.values():
            self._wait(residency.blocks)
        device, _ = self._look()
        held = sum(sum(kinds.values()) for kinds in device.values())
        assert held == self._in_use, f"the roles hold {held} bytes of device memory, accounted are {self._in_use}"

    # --- what it cost, what is where ---

    def collect_cost(self) -> SwitchCost:
        """The cost since the last call."""
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
                        block.wanted = block.wanted and block.on_device
                self._changed.notify_all()
            for lane in self._lanes:
                lane.close()
        for residency in self.roles.values():
            residency.unpin()


class _Groups:
    """Blocks of one role and kind that move together, in the order in which they were added."""

    def __init__(self, num_bytes: int) -> None:
        """``num_bytes``: of a group; a block that is larger is a group of its own."""
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
    """The last moves that were queued for these blocks, each once."""
    return list({id(block.moving): block.moving for block in blocks if block.moving is not None}.values())


def _set_moves(blocks: Sequence[Block], move: Future[None]) -> None:
    for block in blocks:
        block.moving = move

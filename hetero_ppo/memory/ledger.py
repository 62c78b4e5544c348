"""Record of what each role holds, and where: read from its storages before and after every switch of turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hetero_ppo.step.kinds import Kind

#: role -> kind -> bytes
RoleBytes = Mapping[str, Mapping[Kind, int]]


@dataclass(frozen=True)
class LedgerEntry:
    """One look at the memory of this rank."""

    phase: str
    moment: str  # "before" or "after" the switch into the phase
    device: RoleBytes
    host: RoleBytes  # pinned buffers
    reported: int | None  # bytes of tensors, as torch's allocator reports them; None without CUDA
    reserved: int | None  # bytes that torch's allocator took from the driver, with these tensors; None without CUDA

    @property
    def device_bytes(self) -> int:
        return total(self.device)

    @property
    def unaccounted(self) -> int | None:
        """Bytes that the device reports and no role owns: activations, workspaces, a leak."""
        return None if self.reported is None else self.reported - self.device_bytes

    @property
    def cached(self) -> int | None:
        """Bytes that torch's allocator keeps without a tensor in them: freed and not given back, or cut up (fragmentation)."""
        return None if self.reserved is None or self.reported is None else self.reserved - self.reported


@dataclass
class Ledger:
    """Entries of the newest steps, and the most that every phase held."""

    look: Callable[[], tuple[RoleBytes, RoleBytes]]  # (device, host), now
    reported: Callable[[], int | None]
    reserved: Callable[[], int | None]
    entries: list[LedgerEntry] = field(default_factory=list)
    phases: dict[str, dict[str, dict[Kind, int]]] = field(default_factory=dict)  # phase -> role -> kind -> bytes
    # Phase -> bytes that torch's allocator had; CUDA only.
    reserved_phases: dict[str, int] = field(default_factory=dict)
    max_entries: int = 256

    def record(self, phase: str, moment: str) -> LedgerEntry:
        """Read the memory, keep the entry and return it; the oldest entries are dropped."""
        device, host = self.look()
        entry = LedgerEntry(phase, moment, device, host, self.reported(), self.reserved())
        self.entries.append(entry)
        del self.entries[: -self.max_entries]
        return entry

    def computed(self, phase: str, held: RoleBytes) -> None:
        """Keep the most that the roles of a phase have held while it computed."""
        reserved = self.reserved()
        if reserved is not None:  # it does not shrink within a turn, so it is the turn's most
            self.reserved_phases[phase] = max(reserved, self.reserved_phases.get(phase, 0))
        known = self.phases.setdefault(phase, {})
        for role, kinds in held.items():
            most = known.setdefault(role, {})
            for kind, num_bytes in kinds.items():
                most[kind] = max(most.get(kind, 0), num_bytes)


def total(held: RoleBytes) -> int:
    """Return the bytes of all roles and kinds."""
    return sum(num_bytes for kinds in held.values() for num_bytes in kinds.values())

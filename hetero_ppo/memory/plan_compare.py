"""Compare the plan with what the ledger of a run recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hetero_ppo.memory.plan import GIB, MemoryPlan
from hetero_ppo.step.kinds import Kind
from hetero_ppo.table import render_table


@dataclass(frozen=True)
class ComparedBytes:
    """One kind of a role in a phase, bytes on the device."""

    phase: str
    role: str
    kind: Kind
    planned: int
    recorded: int

    @property
    def error_pct(self) -> float:
        """(planned - recorded) / recorded in per cent; infinite for what was planned and never came."""
        return _error_pct(self.planned, self.recorded)


@dataclass(frozen=True)
class Comparison:
    """Plan and ledger next to each other, without activations and the generator."""

    rows: tuple[ComparedBytes, ...]
    only_planned: tuple[str, ...]  # phases that never came
    only_recorded: tuple[str, ...]  # phases outside the steps: export, loading a checkpoint

    @property
    def plan_error_pct(self) -> float:
        """Largest difference of a phase's bytes, all roles and kinds together, in per cent of what was recorded."""
        phases = dict.fromkeys(row.phase for row in self.rows)
        return max((abs(_error_pct(*self._sums(phase))) for phase in phases), default=0.0)

    def _sums(self, phase: str) -> tuple[int, int]:
        rows = [row for row in self.rows if row.phase == phase]
        return sum(row.planned for row in rows), sum(row.recorded for row in rows)

    def render(self) -> str:
        """Return a table of the rows and a sum for every phase, in GiB, or in MiB where no phase holds one GiB."""
        phases = dict.fromkeys(row.phase for row in self.rows)
        unit = "GiB" if max(self._sums(phase)[0] for phase in phases) >= GIB else "MiB"
        divisor = GIB if unit == "GiB" else GIB // 1024
        lines = [("phase", "role", "kind", f"plan {unit}", f"ledger {unit}", "difference")]
        for phase in phases:
            for row in self.rows:
                if row.phase == phase:
                    lines.append((phase, row.role, row.kind.value, *_cells(row.planned, row.recorded, divisor)))
            lines.append((phase, "all", "", *_cells(*self._sums(phase), divisor)))
        texts = [render_table(lines, "lllrrr")]
        for name, alone in (("plan", self.only_planned), ("ledger", self.only_recorded)):
            texts += [f"in the {name} alone: {', '.join(alone)}"] if alone else []
        return "\n".join([*texts, f"largest difference of a phase: {self.plan_error_pct:.2f} %"])


def compare_reserved(plan: MemoryPlan, reserved: Mapping[str, int]) -> str:
    """Return a table of what torch's allocator had in each phase and what the plan counts in it: tensors, workspaces, slack.

    The plan counts every phase by itself. torch keeps what earlier phases left, until it gives memory back before the generator wakes.

    Args:
        plan: Plan of the rank that kept the ledger.
        reserved: Phase -> most bytes that torch's allocator had (``Ledger.reserved_phases``).
    """
    phases = [phase for phase in plan.phases if phase.phase in reserved]
    lines = [("phase", "plan GiB", "reserved GiB", "difference")]
    lines += [(phase.phase, *_cells(phase.pooled, reserved[phase.phase], GIB)) for phase in phases]
    most = (
        max((phase.pooled for phase in phases), default=0),
        max((reserved[phase.phase] for phase in phases), default=0),
    )
    lines.append(("the most", *_cells(*most, GIB)))
    return render_table(lines, "lrrr")


def _error_pct(planned: int, recorded: int) -> float:
    if planned == recorded:
        return 0.0
    return float("inf") if recorded == 0 else 100.0 * (planned - recorded) / recorded


def _cells(planned: int, recorded: int, divisor: int) -> tuple[str, str, str]:
    return f"{planned / divisor:.3f}", f"{recorded / divisor:.3f}", f"{_error_pct(planned, recorded):+.2f} %"


def compare(plan: MemoryPlan, ledger_bytes: Mapping[str, Mapping[str, Mapping[Kind, int]]]) -> Comparison:
    """Return the device bytes of the plan and of a ledger, row by row.

    Args:
        plan: Plan of the rank that kept the ledger (``plan_memory(..., rank=...)``), or of the fullest one for a ledger of that.
        ledger_bytes: Phase -> role -> kind -> bytes on the device while the phase computed, after the first optimizer step.

    Raises:
        ValueError: Plan and ledger have no phase in common.
    """
    planned = {phase.phase: phase.roles for phase in plan.phases}
    common = [phase for phase in planned if phase in ledger_bytes]
    if not common:
        raise ValueError(
            f"the ledger has the phases {', '.join(ledger_bytes)}, and the plan {', '.join(planned)}; compare a plan with a "
            "ledger of the same config"
        )
    rows = []
    for phase in common:
        roles, recorded = planned[phase], ledger_bytes[phase]
        for role in dict.fromkeys([*roles, *recorded]):
            left, right = roles.get(role, {}), recorded.get(role, {})
            rows += [
                ComparedBytes(phase, role, kind, left.get(kind, 0), right.get(kind, 0))
                for kind in Kind
                if left.get(kind, 0) or right.get(kind, 0)
            ]
    return Comparison(
        tuple(rows),
        only_planned=tuple(phase for phase in planned if phase not in ledger_bytes),
        only_recorded=tuple(phase for phase in ledger_bytes if phase not in planned),
    )

"""Write the plan as a page of text, as two lines, and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hetero_ppo.config.schema import ResidencyConfig
from hetero_ppo.memory.plan import GIB, MemoryPlan, PhasePlan
from hetero_ppo.memory.plan_generator import GeneratorPlan
from hetero_ppo.memory.plan_limits import Limits
from hetero_ppo.memory.plan_reserve import ReservePart
from hetero_ppo.observability.json_text import json_text
from hetero_ppo.step.kinds import Kind
from hetero_ppo.table import render_table

BAR_CELLS = 24
_EIGHTHS = " ▏▎▍▌▋▊▉"
NOTHING = "-"


@dataclass(frozen=True)
class Unit:
    """Unit of the sizes on a page."""

    name: str
    num_bytes: int
    digits_of_seconds: int

    def text(self, size: float) -> str:
        """Return a number of bytes in this unit, with two digits."""
        return f"{size / self.num_bytes:.2f}"

    def cell(self, size: int) -> str:
        """Return the same, and a dash for 0."""
        return self.text(size) if size else NOTHING

    def seconds(self, seconds: float) -> str:
        return f"{seconds:.{self.digits_of_seconds}f}"


def unit_of(plan: MemoryPlan) -> Unit:
    """Return GiB (2^30 bytes), or MiB for a run that holds less than one GiB."""
    return Unit("GiB", GIB, 2) if plan.peak.total >= GIB else Unit("MiB", GIB // 1024, 4)


def render_plan(plan: MemoryPlan, limits: Limits) -> str:
    """Return a page with roles, device bytes and a bar for every phase, copies, and host memory."""
    unit = unit_of(plan)
    parts = [_roles_table(plan), _device_table(plan, unit)]
    if plan.peak.reserves:
        parts.append(_reserve_table(plan, unit))
    if plan.generator is not None and plan.generator.awake:
        parts.append(_generator_line(plan.generator, unit))
    if plan.residency is not None and plan.residency.offload:
        parts.append(_copies_table(plan, plan.residency, unit))
    parts.append(_host_lines(plan, limits, unit))
    return "\n\n".join(parts)


def summarise(plan: MemoryPlan, limits: Limits) -> str:
    """Return two lines: the fullest phase, and host memory."""
    peak, unit = plan.peak, unit_of(plan)
    device = "(the CPU)" if plan.device_bytes is None else f"of {unit.text(plan.device_bytes)}"
    lines = [
        [
            "device",
            f"{unit.text(peak.total)} {unit.name} {device} in {peak.phase}, {unit.text(peak.activations)} of them activations",
        ],
        [
            "host",
            f"{unit.text(plan.host.total)} {unit.name} of {unit.text(limits.host)} ({limits.host_source}) on the fullest node",
        ],
    ]
    return render_table(lines, "ll")


def _roles_table(plan: MemoryPlan) -> str:
    nodes = -(-plan.world_size // plan.ranks_per_node)
    ranks = f"{plan.world_size} rank{'s' if plan.world_size > 1 else ''}"
    lines = [
        [
            "role",
            "model",
            "dtype",
            f"layout of {ranks}, {nodes} node{'s' if nodes > 1 else ''}",
            "parameters",
            "on a rank",
        ]
    ]
    for role in plan.roles:
        lines.append(
            [role.name, role.model, role.dtype, role.layout, f"{role.parameters:,}", f"{role.parameters_per_rank:,}"]
        )
    return render_table(lines, "llllrr")


def _device_table(plan: MemoryPlan, unit: Unit) -> str:
    scale = plan.device_bytes or plan.peak.total
    limit = f"of {unit.text(plan.device_bytes)}" if plan.device_bytes is not None else "the CPU"
    kinds = [kind.value for kind in Kind]
    head = [
        "phase",
        "resident",
        *kinds,
        "activations",
        "ahead",
        "generator",
        *(["reserve"] if plan.peak.reserve else []),
        "total",
        "",
    ]
    lines = [head]
    for phase in plan.phases:
        sizes = [*(phase.of_kind(kind) for kind in Kind), phase.activations, phase.ahead, phase.generator]
        sizes += [phase.reserve] if plan.peak.reserve else []
        mark = "  <- peak" if phase is plan.peak else ""
        mark += "  DOES NOT FIT" if plan.device_bytes is not None and phase.total > plan.device_bytes else ""
        lines.append(
            [
                phase.phase,
                resident_text(plan, phase),
                *map(unit.cell, sizes),
                unit.text(phase.total),
                f"{bar(phase.total / scale)}{mark}",
            ]
        )
    columns = "ll" + "r" * (len(head) - 3) + "l"
    return f"device memory, {unit.name} on the fullest rank of each phase ({limit})\n{render_table(lines, columns)}"


def resident_text(plan: MemoryPlan, phase: PhasePlan) -> str:
    """Return the names of the roles on the device, or "all roles" where none leaves."""
    if len(phase.roles) == len(plan.roles) > 1:
        return "all roles"
    return ", ".join(phase.roles) or NOTHING


def bar(share: float) -> str:
    """Return a bar of ``BAR_CELLS`` cells between strokes; a share over 1 goes beyond the right one."""
    eighths = round(share * BAR_CELLS * 8)
    full, rest = divmod(eighths, 8)
    if full >= BAR_CELLS:
        return "|" + "█" * BAR_CELLS + "|" + "█" * min(full - BAR_CELLS, BAR_CELLS)
    return "|" + ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(BAR_CELLS) + "|"


def _reserve_table(plan: MemoryPlan, unit: Unit) -> str:
    """Return a table of what a device holds besides tensors, each part in the phase where it is largest."""
    largest: dict[str, ReservePart] = {}
    for phase in plan.phases:
        for part in phase.reserves:
            if part.name not in largest or part.num_bytes > largest[part.name].num_bytes:
                largest[part.name] = part
    when = {"always": "all phases", "asleep": "while vLLM is not awake", "sync": "weight_sync"}
    lines = [["reserve", "phases", unit.name, ""]]
    lines += [[part.name, when[part.when], unit.text(part.num_bytes), part.source] for part in largest.values()]
    return render_table(lines, "llrl")


def _generator_line(generator: GeneratorPlan, unit: Unit) -> str:
    if not generator.weights:
        when = "while it generates" if generator.sleeps else "throughout"
        return (
            f"generator: the actor itself, with {unit.text(generator.awake)} {unit.name} for {generator.kv_tokens:,} tokens of KV "
            f"cache {when}"
        )
    return (
        f"generator: {unit.text(generator.awake)} {unit.name} of a device while it generates, of which {unit.text(generator.weights)} weights "
        f"and at most {generator.kv_tokens:,} tokens of KV cache;\nits weights alone during the weight sync; asleep otherwise"
    )


def _copies_table(plan: MemoryPlan, residency: ResidencyConfig, unit: Unit) -> str:
    rate = residency.pcie_gb_s
    lines = [["as a phase begins", f"{unit.name} out", f"{unit.name} in", "s out, then in", "s side by side"]]
    for phase in plan.phases:
        if phase.copied_in or phase.copied_out:
            serial, side_by_side = (phase.seconds(rate, overlap=overlap) for overlap in (False, True))
            lines.append(
                [
                    phase.phase,
                    unit.cell(phase.copied_out),
                    unit.cell(phase.copied_in),
                    unit.seconds(serial),
                    unit.seconds(side_by_side),
                ]
            )
    sums = [sum(phase.seconds(rate, overlap=overlap) for phase in plan.phases) for overlap in (False, True)]
    out, back = sum(phase.copied_out for phase in plan.phases), sum(phase.copied_in for phase in plan.phases)
    lines.append(["a step", unit.cell(out), unit.cell(back), unit.seconds(sums[0]), unit.seconds(sums[1])])
    chosen = "side by side" if residency.overlap else "one after the other"
    return f"copies of a rank at {rate:g} GB/s each way; this config does them {chosen}\n{render_table(lines, 'lrrrr')}"


def _host_lines(plan: MemoryPlan, limits: Limits, unit: Unit) -> str:
    host = plan.host
    sizes = {f"{name}, pinned": size for name, size in host.pinned.items()}
    sizes["generator's weights on their way (shared memory)"] = host.weight_files
    sizes["generator"] = host.generator
    if host.checkpoint >= host.loading:
        sizes["a checkpoint's copy, until it is written"] = host.checkpoint
    else:
        sizes["a tensor of a checkpoint on each rank, while it is loaded"] = host.loading
    sizes["the ranks' share above: the device is the CPU"] = host.device_is_host
    lines = [[name, unit.text(size)] for name, size in sizes.items() if size]
    lines.append(["all", f"{unit.text(host.total)}"])
    fits = "" if host.total <= limits.host else "  DOES NOT FIT"
    head = f"host memory, {unit.name} on the fullest node (of {unit.text(limits.host)}: {limits.host_source})"
    return f"{head}\n{render_table(lines, 'lr')}{fits}"


def plan_values(plan: MemoryPlan, limits: Limits) -> dict[str, Any]:
    """Return the whole plan as values for JSON: sizes in bytes, copies also in seconds."""
    rate = plan.residency.pcie_gb_s if plan.residency is not None else None
    phases = []
    for phase in plan.phases:
        values = asdict(phase)
        values["roles"] = {
            role: {kind.value: size for kind, size in kinds.items()} for role, kinds in phase.roles.items()
        }
        values |= {"counted": phase.counted, "reserve": phase.reserve, "pooled": phase.pooled, "total": phase.total}
        if rate is not None:
            values["seconds_serial"] = phase.seconds(rate, overlap=False)
            values["seconds_overlapped"] = phase.seconds(rate, overlap=True)
        phases.append(values)
    generator = plan.generator
    return {
        "kind": plan.kind,
        "world_size": plan.world_size,
        "ranks_per_node": plan.ranks_per_node,
        "roles": [asdict(role) for role in plan.roles],
        "phases": phases,
        "peak": plan.peak.phase,
        "generator": None if generator is None else {**asdict(generator), "kv_tokens": generator.kv_tokens},
        "host": {**asdict(plan.host), "total": plan.host.total},
        "limits": asdict(limits),
    }


def write_json(plan: MemoryPlan, limits: Limits, path: str) -> None:
    """Write ``plan_values`` to a file.

    Raises:
        ValueError: The file cannot be written.
    """
    try:
        Path(path).write_text(json_text(plan_values(plan, limits), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--json {path}: cannot be written ({error.strerror})") from error

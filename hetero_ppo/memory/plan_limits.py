"""Find the memory of a device and of a node, and where a plan exceeds it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hetero_ppo.config.schema import ResidencyConfig
from hetero_ppo.memory.plan import GIB, MemoryPlan

CGROUP_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Limits:
    """Memory in bytes that a run may take. A device of None is the CPU, which has no limit of its own."""

    device: int | None  # of one device
    host: int  # of one node
    host_source: str  # where the limit comes from


@dataclass(frozen=True)
class Excess:
    """A limit that a plan breaks."""

    place: str  # "device", "generator" (its share does not hold its weights) or "host"
    phase: str | None  # None: in all phases
    roles: tuple[str, ...]
    over: int  # bytes

    def describe(self) -> str:
        """Return one clause for an error message."""
        over = f"{self.over / GIB:.2f} GiB"
        roles = ", ".join(self.roles)
        if self.place == "generator":
            return f"the generator's share of the device is {over} too small for its weights"
        if self.place == "host":
            return f"host memory of a node: {over} over ({roles})"
        return f"phase {self.phase}: {over} over on a device ({roles or 'the generator alone'})"


def find_limits(
    residency: ResidencyConfig | None, device_gib: float | None = None, host_gib: float | None = None
) -> Limits:
    """Return the memory that a run may take: as the command line says, else as the configuration says, else all of the machine's.

    Args:
        residency: Section of a PPO run; None for other kinds.
        device_gib: Memory of one device in GiB, as the command line says.
        host_gib: Memory of one node in GiB, as the command line says.

    Raises:
        ValueError: A size is not positive.
    """
    given = {
        "--device-gib": device_gib,
        "residency.device_gib": None if residency is None else residency.device_gib,
        "--host-gib": host_gib,
        "residency.host_gib": None if residency is None else residency.host_gib,
    }
    for name, value in given.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}: a memory size in GiB is above 0")
    device = _first(device_gib, given["residency.device_gib"])
    for name in ("--host-gib", "residency.host_gib"):
        if given[name] is not None:
            return Limits(_bytes(device) or cuda_device_bytes(), _bytes(given[name]) or 0, name)
    host, source = machine_host_bytes()
    return Limits(_bytes(device) or cuda_device_bytes(), host, source)


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else int(gib * GIB)


def cuda_device_bytes() -> int | None:
    """Return the memory of this rank's CUDA device as the driver reports it, without allocating on it; None without CUDA."""
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0"))).total_memory


def machine_host_bytes(
    cgroup_root: Path = CGROUP_ROOT, own_cgroups: Path = Path("/proc/self/cgroup")
) -> tuple[int, str]:
    """Return (bytes, what sets them): the lowest of this process's cgroup limits, v2 or v1, and the machine's memory."""
    limits = [(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "the machine's memory")]
    lines = own_cgroups.read_text().splitlines() if own_cgroups.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            limits += _cgroup_limits(cgroup_root, path, "memory.max")
        elif "memory" in controllers.split(","):
            limits += _cgroup_limits(cgroup_root / "memory", path, "memory.limit_in_bytes")
    return min(limits)


def _cgroup_limits(root: Path, path: str, name: str) -> list[tuple[int, str]]:
    """Return the limits of a cgroup and of all above it. In a container the own cgroup is the root, whatever the path says."""
    folder = root / path.strip("/")
    files = [parent / name for parent in (folder, *folder.parents) if parent == root or root in parent.parents]
    texts = [(file, file.read_text().strip()) for file in files if file.is_file()]
    return [(int(text), f"the cgroup limit in {file}") for file, text in texts if text != "max"]


def find_excess(plan: MemoryPlan, limits: Limits) -> Excess | None:
    """Return the first limit that a plan breaks: in the fullest phase, of the generator's share, or of host memory."""
    if limits.device is not None:
        phase = plan.peak
        if phase.total > limits.device:
            return Excess("device", phase.phase, tuple(phase.roles), phase.total - limits.device)
        generator = plan.generator
        if generator is not None and generator.weights > generator.awake:
            return Excess("generator", "rollout", (), generator.weights - generator.awake)
    if plan.host.total > limits.host:
        roles = tuple(plan.host.pinned) or tuple(role.name for role in plan.roles)
        return Excess("host", None, roles, plan.host.total - limits.host)
    return None

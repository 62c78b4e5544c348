"""The memory of a PPO run in its log: the plan before anything is loaded, and the ledger next to it after the first step."""

from __future__ import annotations

import logging

import torch.distributed as dist

from hetero_ppo.config.schema import PpoConfig
from hetero_ppo.disk import writing
from hetero_ppo.engines.shared_device import SharedDevice
from hetero_ppo.memory.ledger import total
from hetero_ppo.memory.plan import GIB, plan_memory
from hetero_ppo.memory.plan_check import check_fits
from hetero_ppo.memory.plan_compare import compare, compare_reserved
from hetero_ppo.memory.plan_limits import find_limits
from hetero_ppo.observability.json_text import json_text
from hetero_ppo.observability.jsonl import write_whole
from hetero_ppo.observability.records import LEDGER_FILE
from hetero_ppo.trainers.run import Run

log = logging.getLogger(__name__)


def log_plan(config: PpoConfig, run: Run) -> None:
    """Log the peak of the plan.

    Raises:
        ValueError: The run does not fit its devices.
    """
    plan = check_fits(config, run.world_size)
    turns = "roles take turns" if config.residency.offload else "all roles stay"
    log.info(
        f"memory plan ({turns}): at most {plan.peak.total / GIB:.2f} GiB on a device, in phase {plan.peak.phase}, "
        f"{plan.host.total / GIB:.2f} GiB of host memory on a node; hetero-ppo plan shows all of it"
    )


def log_ledger(config: PpoConfig, run: Run, device: SharedDevice) -> None:
    """Log the plan of this rank next to what its storages held in each phase, and write both to the run folder.

    Rank 0 stands for all ranks: those of one role hold the same, but for the ends of a pipeline.
    """
    if not run.is_writer:
        return
    plan = plan_memory(config, run.world_size, rank=dist.get_rank(), device_bytes=find_limits(config.residency).device)
    compared = compare(plan, device.ledger.phases)
    log.info("memory on the device, plan and ledger of rank 0:\n" + compared.render())
    reserved = device.ledger.reserved_phases
    if reserved:
        log.info(
            "memory that torch has reserved on rank 0, activations, workspaces and slack included:\n"
            + compare_reserved(plan, reserved)
        )
    phases = {
        phase: {role: {kind.value: size for kind, size in kinds.items()} for role, kinds in roles.items()}
        for phase, roles in device.ledger.phases.items()
    }
    record = {
        "phases": phases,
        "plan_error_pct": compared.plan_error_pct,
        "device_peak_bytes": device.peak_bytes,
        "device_limit_bytes": device.limit,
        "reserved_bytes": reserved,
        "switches": [
            {
                "phase": entry.phase,
                "moment": entry.moment,
                "device_bytes": entry.device_bytes,
                "host_bytes": total(entry.host),
                "reported_bytes": entry.reported,
                "reserved_bytes": entry.reserved,
            }
            for entry in device.ledger.entries
        ],
    }
    with writing(run.dir / LEDGER_FILE, "ledger of memory"):
        write_whole(run.dir / LEDGER_FILE, json_text(record, indent=1))


def memory_metrics(device: SharedDevice) -> dict[str, float]:
    """Return what switching roles has cost since the last call, and the most that they held on the device since the run began."""
    cost = device.collect_cost()
    values = {
        "memory/device_peak_gib": device.peak_bytes / GIB,
        "memory/switch_wait_s": cost.waited_s,
        "memory/to_device_gib": cost.bytes_in / GIB,
        "memory/to_host_gib": cost.bytes_out / GIB,
    }
    unaccounted = [entry.unaccounted for entry in device.ledger.entries if entry.unaccounted is not None]
    if unaccounted:
        values["memory/unaccounted_gib"] = max(unaccounted) / GIB
    for name, sizes in (
        ("allocated", [entry.reported for entry in device.ledger.entries]),
        ("reserved", [entry.reserved for entry in device.ledger.entries]),
        ("cached", [entry.cached for entry in device.ledger.entries]),
    ):
        known = [size for size in sizes if size is not None]
        if known:
            values[f"memory/{name}_gib"] = max(known) / GIB
    return values

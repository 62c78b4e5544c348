"""Make a table and a JSON object of measured seconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import harness
from ppo_step_inputs import ModelShape, Work

from hetero_ppo.table import render_table

TOTAL = "total"
OTHER = "other"

#: Phase of the table -> phases of the trainer's ``metrics.jsonl`` that belong to it.
PHASES: dict[str, tuple[str, ...]] = {
    "rollout": ("rollout",),
    "weight sync": ("weight_sync",),
    "old log-probs": ("experience/old_log_probs",),
    "reference log-probs": ("experience/ref_log_probs",),
    "scores": ("experience/scores",),
    "values": ("experience/values",),
    "training actor": ("train_actor",),
    "training critic": ("train_critic",),
}
#: Phase of a peer's step -> the phases of the table that do the same work (for the table alone).
PEER_PHASES: dict[str, tuple[str, ...]] = {
    "generation": ("rollout", "weight sync"),
    "forwards": ("old log-probs", "reference log-probs", "scores", "values"),
    "training": ("training actor", "training critic"),
    OTHER: (OTHER,),
}


def read_steps(path: Path) -> list[dict[str, float]]:
    """Read the seconds by phase of the table, and the total, of every training step of a ``metrics.jsonl``, in order of the steps.

    A step that the file holds twice counts once, with its later record. Records without seconds (an evaluation) are left out.

    Raises:
        ValueError: A line is not such a record, or no step has seconds.
    """
    by_step: dict[int, dict[str, float]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            step, seconds = int(record["step"]), record["seconds"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a record with `step` and `seconds`: {error}") from error
        if TOTAL in seconds and any(name in seconds for names in PHASES.values() for name in names):
            by_step[step] = table_seconds(seconds)
    if not by_step:
        raise ValueError(f"{path}: no record has seconds of a PPO step")
    return [by_step[step] for step in sorted(by_step)]


def table_seconds(seconds: dict[str, float]) -> dict[str, float]:
    """Return one step's seconds by phase of the table. ``other`` is the rest of the total; phases that are absent are 0."""
    phases = {phase: sum(seconds.get(name, 0.0) for name in names) for phase, names in PHASES.items()}
    return {**phases, OTHER: seconds[TOTAL] - sum(phases.values()), TOTAL: seconds[TOTAL]}


def summary(rounds: Sequence[Sequence[dict[str, float]]], work: Work) -> dict[str, Any]:
    """Return the medians of one system.

    A round's rate comes from the median of its steps; the reported rate is the median over rounds. Seconds by phase are
    medians over all steps of all rounds, so their sum can differ from the median step.

    Args:
        rounds: Rounds of steps, each with its seconds by phase.
        work: Size of a step.
    """
    steps = [step for one in rounds for step in one]
    round_rates = [work.prompts_per_step / median(step[TOTAL] for step in one) for one in rounds]
    return {
        "seconds": {phase: round(median(step[phase] for step in steps), 4) for phase in steps[0] if phase != TOTAL},
        "step_s": round(median(step[TOTAL] for step in steps), 4),
        "samples_per_s": round(median(round_rates), 3),
        "tokens_per_s": round(median(round_rates) * work.tokens_per_step / work.prompts_per_step, 1),
        "fastest_step_s": round(min(step[TOTAL] for step in steps), 4),
        "samples_per_s_of_rounds": [round(rate, 3) for rate in round_rates],
        "num_steps": len(steps),
    }


def ratios(ours: dict[str, Any], peer: dict[str, dict[str, Any]], dtype: str) -> dict[str, Any]:
    """Return our samples/s over the peer's: at the same dtype, and against the peer's best dtype.

    They are medians of the ratios within each round. Where other jobs run on the machine, the ratio of the fastest steps is the
    closest to that of a quiet machine.

    Args:
        ours: Summary of this project.
        peer: Summary of the peer, by dtype.
        dtype: Our dtype.
    """

    def against(other: dict[str, Any]) -> float:
        return round(harness.median_ratio(ours["samples_per_s_of_rounds"], other["samples_per_s_of_rounds"]), 3)

    best = max(peer, key=lambda name: peer[name]["samples_per_s"])
    return {
        "samples_per_s_ratio": against(peer[dtype]),
        "samples_per_s_ratio_vs_best": against(peer[best]),
        "samples_per_s_ratio_fastest_steps": round(peer[dtype]["fastest_step_s"] / ours["fastest_step_s"], 3),
        "peer_best_dtype": best,
    }


def model_result(
    shape: ModelShape, dtype: str, ours: dict[str, Any], peer_name: str | None, peer: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return the JSON object of one model size."""
    result = {"model": shape.name, "num_parameters": shape.num_parameters, "shape": asdict(shape), "dtype": dtype}
    result["ours"] = ours
    if peer_name is not None:
        result["peer"] = {"name": peer_name, **peer}
        result.update(ratios(ours, peer, dtype))
    return result


def report(results: list[dict[str, Any]], work: Work, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of the benchmark. Its ratios are the smallest over the models."""
    whole: dict[str, Any] = {"work": asdict(work), **settings, "results": results}
    for name in ("samples_per_s_ratio", "samples_per_s_ratio_vs_best"):
        found = [result[name] for result in results if name in result]
        if found:
            whole[name] = min(found)
    return whole


def table(result: dict[str, Any]) -> str:
    """Return the result of one model size for people: one column per system, one row per phase."""
    columns = [(f"ours {result['dtype']}", result["ours"])]
    peer = dict(result.get("peer", {}))
    name = peer.pop("name", "")
    columns += [(f"{name} {dtype}", peer[dtype]) for dtype in peer]
    rows = [["seconds per PPO step", *(title for title, _ in columns)]]
    for group, phases in PEER_PHASES.items():
        if group != OTHER:
            empty = [""] * len(peer)
            rows += [[f"  {phase}", f"{result['ours']['seconds'][phase]:.3f}", *empty] for phase in phases]
        rows.append([group, *(f"{group_seconds(system, group):.3f}" for _, system in columns)])
    for label, key, digits in (
        ("step", "step_s", 3),
        ("fastest step", "fastest_step_s", 3),
        ("samples/s", "samples_per_s", 2),
        ("tokens/s", "tokens_per_s", 0),
    ):
        rows.append([label, *(f"{system[key]:.{digits}f}" for _, system in columns)])
    lines = [
        f"{result['model']}: {result['num_parameters']:,} parameters in each of four models",
        render_table(rows, "l" + "r" * len(columns)),
    ]
    if "samples_per_s_ratio" in result:
        lines.append(
            f"samples_per_s_ratio {result['samples_per_s_ratio']} (both {result['dtype']}), "
            f"samples_per_s_ratio_vs_best {result['samples_per_s_ratio_vs_best']} ({name} {result['peer_best_dtype']}), "
            f"of the fastest steps {result['samples_per_s_ratio_fastest_steps']}"
        )
    return "\n".join(lines)


def group_seconds(system: dict[str, Any], group: str) -> float:
    """Return the seconds of a row that ours and a peer share."""
    seconds = system["seconds"]
    if group in seconds:
        return seconds[group]
    return sum(seconds[phase] for phase in PEER_PHASES[group])

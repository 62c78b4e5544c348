"""Count the bytes in which two runs differ: all parts of a checkpoint, and the metrics of its step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from hetero_ppo.engines.role_reading import read_metadata

#: Sections of a configuration that a case overrides, or that hold paths and lengths.
OTHER_SECTIONS = ("run", "checkpoint", "rollout", "train", "reward")
#: Keys of trainer.json that name the run and are no state.
NAMES = ("run_id", "begun")


def records(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Return the record of every step; of a step that ran twice, the later one."""
    return {record["step"]: record for record in _lines(run_dir)[0]}


def _lines(run_dir: Path) -> tuple[list[dict[str, Any]], str]:
    """Read metrics.jsonl. Return its records, and the text of torn lines: a process may have died in a line."""
    path = run_dir / "metrics.jsonl"
    found: list[dict[str, Any]] = []
    torn = ""
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            torn += line
    return found, torn


def differing_bytes(found: bytes, expected: bytes) -> int:
    """Count the positions at which two texts differ, and those that only the longer one has."""
    return sum(a != b for a, b in zip(found, expected, strict=False)) + abs(len(found) - len(expected))


def repeated(metrics: dict[str, float], *, replayed: bool) -> dict[str, float]:
    """Return the metrics that are no seconds, bytes or rates; for a replayed run also without those of the generator."""
    others = ("memory/", "pipeline/", *(("rollout/",) if replayed else ()))
    return {k: v for k, v in metrics.items() if not k.startswith(others) and not k.endswith("_s")}


def _state(folder: Path, *, replayed: bool) -> dict[str, str]:
    """Return the text of every part of trainer.json, by name."""
    state = json.loads((folder / "trainer.json").read_text())
    state["metrics"] = repeated(state["metrics"], replayed=replayed)
    return {name: json.dumps(value, sort_keys=True) for name, value in state.items() if name not in NAMES}


def _config(folder: Path) -> str:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return json.dumps({name: value for name, value in config.items() if name not in OTHER_SECTIONS}, sort_keys=True)


def _contents(path: Path) -> bytes:
    """Return the contents of a file. A description of tensors is taken without the save's path and id, and in sorted order."""
    if not path.exists():
        return b""
    if path.name != ".metadata":
        return path.read_bytes()
    metadata = vars(read_metadata(path.parent))
    parts = {name: value for name, value in metadata.items() if name != "storage_meta"}
    lines = []
    for name, part in parts.items():
        pairs = part if isinstance(part, dict) else {"": part}
        lines += [f"{name} {key!r} {value!r}" for key, value in pairs.items()]
    return "\n".join(sorted(lines)).encode()


def compare(run_dir: Path, straight: Path, step: int, *, replayed: bool = False) -> dict[str, int]:
    """Count the bytes that differ in each part of a step's checkpoint and in the step's metrics.

    The parts are weights, main parameters, moments and schedules (``*.distcp``, ``common.pt``), their descriptions, the random generators of every rank,
    every part of trainer.json (sampler, KL coefficient, running moments, mismatch guard, chunk size, template) and the configuration. COMPLETE
    holds checksums of these, so it is left out.

    Args:
        run_dir: Folder of the run that met a fault.
        straight: Folder of the run that met none.
        step: Step of the checkpoints.
        replayed: True when the other run replays this one's rollouts, so that it has no generator.

    Returns:
        The count of each part that differs.
    """
    a, b = (folder / "checkpoints" / f"iter_{step:07d}" for folder in (run_dir, straight))
    texts: dict[str, tuple[bytes, bytes]] = {}
    names = {str(path.relative_to(folder)) for folder in (a, b) for path in folder.rglob("*") if path.is_file()}
    for name in names - {"COMPLETE", "config.yaml", "trainer.json"}:
        texts[name] = tuple(_contents(folder / name) for folder in (a, b))
    found, expected = _state(a, replayed=replayed), _state(b, replayed=replayed)
    for name in found.keys() | expected.keys():
        texts[f"trainer.json: {name}"] = found.get(name, "").encode(), expected.get(name, "").encode()
    texts["config.yaml"] = _config(a).encode(), _config(b).encode()
    metrics = [repeated(records(folder)[step]["metrics"], replayed=replayed) for folder in (run_dir, straight)]
    texts["metrics"] = tuple(json.dumps(one, sort_keys=True).encode() for one in metrics)
    texts["torn lines of metrics.jsonl"] = _lines(run_dir)[1].encode(), b""
    counts = {name: differing_bytes(*pair) for name, pair in texts.items()}
    return {name: count for name, count in sorted(counts.items()) if count}

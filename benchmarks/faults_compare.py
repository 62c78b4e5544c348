"""What two runs differ in: everything that a checkpoint holds, and the metrics of its step, in bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from hetero_ppo.engines.role_reading import read_metadata

#: Sections of a configuration that say where and how long, and what a case overrides.
OTHER_SECTIONS = ("run", "checkpoint", "rollout", "train", "reward")
#: Keys of trainer.json that name the run, not its state.
NAMES = ("run_id", "begun")


def records(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Step -> its record; the later one of a step that was done twice."""
    return {record["step"]: record for record in _lines(run_dir)[0]}


def _lines(run_dir: Path) -> tuple[list[dict[str, Any]], str]:
    """The records of metrics.jsonl, and what else is in it: a process may have died in a line."""
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
    """Number of positions at which two texts differ, and of those that one has more."""
    return sum(a != b for a, b in zip(found, expected, strict=False)) + abs(len(found) - len(expected))


def repeated(metrics: dict[str, float], *, replayed: bool) -> dict[str, float]:
    """Metrics that are no seconds, bytes or rates; of a replayed run those of the engine, too, are left out."""
    others = ("memory/", "pipeline/", *(("rollout/",) if replayed else ()))
    return {k: v for k, v in metrics.items() if not k.startswith(others) and not k.endswith("_s")}


def _state(folder: Path, *, replayed: bool) -> dict[str, str]:
    """Name -> text of every part of trainer.json."""
    state = json.loads((folder / "trainer.json").read_text())
    state["metrics"] = repeated(state["metrics"], replayed=replayed)
    return {name: json.dumps(value, sort_keys=True) for name, value in state.items() if name not in NAMES}


def _config(folder: Path) -> str:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return json.dumps({name: value for name, value in config.items() if name not in OTHER_SECTIONS}, sort_keys=True)


def _contents(path: Path) -> bytes:
    """Return what a file holds. A description of tensors is read without the save's path and id, and without the order of its dicts."""
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
    """Name -> differing bytes, of all parts of a step's checkpoint that are not those of the other run, and of the step's metrics.

    Weights, main parameters, moments and schedules (``*.distcp``, ``common.pt``), their descriptions, the random generators of every rank,
    every part of trainer.json (sampler, KL coefficient, running moments, mismatch guard, chunk size, template) and the configuration. COMPLETE
    holds checksums of these.

    Args:
        run_dir: Of the run that met a fault.
        straight: Of the run that met none.
        step: Of the checkpoints.
        replayed: The other run answers from this one's rollouts, and has no engine.
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

"""Golden scores: pairs of token ids with the bits of their scores, which every aligned forward of the checkpoint must reproduce.

``golden_scores.jsonl`` lies next to a reward model's weights. Its first line is a record of the software and hardware that made the
scores. Every other line is a pair: token ids, scores as hexadecimal floats, and for the first few pairs a digest of every layer's output. So
a difference can be traced to the layer in which it begins.
"""

from __future__ import annotations

import json
import logging
import os
import platform as python_platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hetero_ppo.config.devices import dtype_of
from hetero_ppo.data.collate import collate_preferences
from hetero_ppo.data.preference import PreferenceExample
from hetero_ppo.engines.model_engine import ModelEngine
from hetero_ppo.engines.outputs import scores_output
from hetero_ppo.errors import RunError
from hetero_ppo.reward.layer_digests import layer_digests
from megatron_bridge import platform

log = logging.getLogger(__name__)

GOLDEN_FILE = "golden_scores.jsonl"
#: Number of pairs in a file, and of those with digests of layers.
NUM_PAIRS, NUM_TRACED = 64, 4
#: Fields of the record that the bits depend on. Equal scores are promised only if these are equal.
DECISIVE = ("dtype", "torch", "megatron_core", "device", "cpu", "cpu_capability", "cpu_flags", "kernel_limits")
#: CPU instructions by which oneDNN and MKL choose their kernels, as /proc/cpuinfo names them.
CPU_FLAGS = (
    *("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni"),
    *("amx_tile", "amx_bf16", "amx_int8", "amx_fp16"),
)
#: Environment variables that limit the instructions that these libraries use.
KERNEL_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")


@dataclass(frozen=True)
class GoldenPair:
    """One pair with the model's scores."""

    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_score: str  # float.hex
    rejected_score: str
    #: Layer and digest of its output, for the chosen sequence.
    layers: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Golden:
    """Contents of a file of golden scores."""

    record: dict[str, Any]
    pairs: list[GoldenPair]

    def text(self) -> str:
        """Return the file's text, as JSON lines."""
        lines: list[dict[str, Any]] = [{"record": self.record}]
        lines += [{"pair": number, **vars(pair)} for number, pair in enumerate(self.pairs)]
        return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)

    def made_elsewhere(self, engine: ModelEngine) -> list[str]:
        """Return the differences between the record and this run in the fields that bits depend on: "cpu: X there, Y here".

        Fields that an older file does not record are not compared.
        """
        here = record_of(engine)
        names = [name for name in DECISIVE if name in self.record and self.record[name] != here[name]]
        return [f"{name}: {_shown(self.record[name])} there, {_shown(here[name])} here" for name in names]


def record_of(engine: ModelEngine) -> dict[str, Any]:
    """Return the record of the software and hardware that make an engine's scores."""
    return {
        "format": 1,
        "dtype": dtype_of(engine.config.model).value,
        "layout": {name: value for name, value in vars(engine.config.parallel).items()},
        "data_parallel": engine.groups.dp.size(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "megatron_core": version("megatron-core"),
        "device": torch.cuda.get_device_name() if platform.HAS_CUDA else "cpu",
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_flags": _cpu_flags(),
        "kernel_limits": {name: os.environ[name] for name in KERNEL_LIMITS if name in os.environ},
    }


def make_golden(engine: ModelEngine, examples: Sequence[PreferenceExample]) -> Golden:
    """Compute golden scores of the first examples. Collective over the world.

    Args:
        engine: Aligned role with a score head.
        examples: At least one example; as many as a file holds are used.
    """
    examples = examples[:NUM_PAIRS]
    scores = pair_scores(engine, [(example.chosen_ids, example.rejected_ids) for example in examples])
    pairs = []
    for number, (example, (chosen, rejected)) in enumerate(zip(examples, scores, strict=True)):
        layers = layer_digests(engine, example.chosen_ids) if number < NUM_TRACED else []
        pairs.append(GoldenPair(example.chosen_ids, example.rejected_ids, chosen, rejected, layers))
    return Golden(record_of(engine), pairs)


def pair_scores(engine: ModelEngine, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[str, str]]:
    """Return (chosen, rejected) scores of (chosen, rejected) token ids, as hexadecimal floats. Collective over the world."""
    batch = collate_preferences([PreferenceExample(chosen, rejected, 0) for chosen, rejected in pairs])
    chosen = engine.forward(batch.chosen_ids, batch.chosen_lengths, scores_output).tolist()
    rejected = engine.forward(batch.rejected_ids, batch.rejected_lengths, scores_output).tolist()
    return [(one.hex(), other.hex()) for one, other in zip(chosen, rejected, strict=True)]


def read_golden(path: Path) -> Golden:
    """Read a ``golden_scores.jsonl``.

    Raises:
        ValueError: The file has another format; the message names file and line.
    """
    golden: Golden | None = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            content = json.loads(line)
            if golden is None:
                golden = Golden({"device": "cpu", **content["record"]}, [])  # older files were only made on CPUs
                continue
            del content["pair"]
            content["layers"] = [(name, value) for name, value in content["layers"]]
            golden.pairs.append(GoldenPair(**content))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a line of golden scores ({error})") from error
    if golden is None or not golden.pairs:
        raise ValueError(f"{path}: holds no golden scores; write it again by training or exporting the reward model")
    return golden


def check_golden(engine: ModelEngine, golden: Golden, path: Path, numbers: Sequence[int]) -> None:
    """Compute the scores of some pairs again and compare their bits. Collective over the world.

    Args:
        engine: Aligned role whose checkpoint has the golden scores.
        golden: Golden scores of the checkpoint.
        path: Path of their file, for the message.
        numbers: Numbers of the pairs to compute.

    Raises:
        RunError: A score differs; the message gives file, pair, both values, and the first layer that differs.
    """
    scores = pair_scores(engine, [(golden.pairs[n].chosen_ids, golden.pairs[n].rejected_ids) for n in numbers])
    for number, (chosen, rejected) in zip(numbers, scores, strict=True):
        pair = golden.pairs[number]
        for side, stored, found in (
            ("chosen", pair.chosen_score, chosen),
            ("rejected", pair.rejected_score, rejected),
        ):
            if stored != found:
                raise RunError(
                    f"{path}, pair {number}: the {side} score is {stored} ({float.fromhex(stored):.9g}) there and {found} "
                    f"({float.fromhex(found):.9g}) here; {_where(engine, golden)}"
                )


def first_difference(engine: ModelEngine, pair: GoldenPair) -> str | None:
    """Return the first layer whose output for a pair's chosen sequence differs from the recorded one. Collective over the world."""
    for (name, stored), (_, found) in zip(pair.layers, layer_digests(engine, pair.chosen_ids), strict=True):
        if stored != found:
            return name
    return None


def _where(engine: ModelEngine, golden: Golden) -> str:
    for number, pair in enumerate(golden.pairs):
        layer = first_difference(engine, pair) if pair.layers else None
        if layer is not None:
            return f"the first layer whose output differs is the {layer} (pair {number})"
    return "no layer's output differs in the pairs that have digests of them"


def _cpu_model() -> str:
    """Return the name of the CPU, or the machine's architecture if the kernel does not name the CPU."""
    return _cpu_info("model name") or python_platform.machine()


def _cpu_flags() -> list[str]:
    """Return those of ``CPU_FLAGS`` that the CPU has. A hypervisor may hide some of them, and the CPU's name."""
    found = _cpu_info("flags").split()
    return [flag for flag in CPU_FLAGS if flag in found]


def _cpu_info(name: str) -> str:
    """Return a field of the first core in /proc/cpuinfo; "" if there is none."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def _shown(value: Any) -> str:
    """Format a value of the record for a message."""
    if isinstance(value, dict):
        return ", ".join(f"{name}={setting}" for name, setting in value.items()) or "none"
    return " ".join(value) or "none" if isinstance(value, list) else str(value)


#: Number of pairs that a running PPO computes in one check; the next check takes others.
NUM_CHECKED = 8


@dataclass
class GoldenGuard:
    """Guard that stops a run when the reward model no longer gives the scores that it gave after its training."""

    engine: ModelEngine  # aligned role with a score head
    golden: Golden
    path: Path
    every: int  # steps between checks; 0: only the first check
    checks: int = 0

    def check(self, step: int, *, first: bool = False) -> None:
        """Compute some pairs again if a check is due. Collective over the world.

        Args:
            step: Number of steps done.
            first: Whether to check in any case.

        Raises:
            RunError: A score differs.
        """
        if not first and not (self.every and step % self.every == 0):
            return
        start, size = self.checks * NUM_CHECKED, len(self.golden.pairs)
        numbers = sorted({number % size for number in range(start, start + NUM_CHECKED)})
        self.checks += 1
        with self.engine.on_device(phase="golden_scores"):
            check_golden(self.engine, self.golden, self.path, numbers)


def golden_guards(reward_models: Sequence[ModelEngine], every: int) -> list[GoldenGuard]:
    """Build a guard for every reward model that has golden scores; log why the others have none.

    Args:
        reward_models: Models of the run that score responses.
        every: Number of steps between two checks; 0: the first check alone.

    Raises:
        ValueError: A file of golden scores cannot be read, or was made in another dtype than its aligned role has.
    """
    guards = []
    for engine in reward_models:
        guard, note = golden_guard(engine, every)
        log.info(note)
        guards += [] if guard is None else [guard]
    return guards


def golden_guard(engine: ModelEngine, every: int) -> tuple[GoldenGuard | None, str]:
    """Build the guard of a role's checkpoint, or None if equal scores cannot be promised. A line explains which of the two.

    Raises:
        ValueError: The file cannot be read, or the role must be aligned but computes in another dtype than the file's scores.
    """
    path = Path(engine.config.model.path) / GOLDEN_FILE
    if not engine.bridge.aligned:
        return (
            None,
            f"{engine.role}: golden scores are not checked, {engine.role}.{engine.plain_because or 'aligned is false'}",
        )
    if not path.is_file():
        return None, f"{engine.role}: there are no golden scores to check, {path} does not exist"
    golden = read_golden(path)
    dtype = dtype_of(engine.config.model).value
    if golden.record["dtype"] != dtype and engine.config.aligned:
        raise ValueError(
            f"{engine.role}.model.dtype is {dtype}, but the golden scores in {path} were made in {golden.record['dtype']}: "
            f"set it to that, or {engine.role}.aligned to false"
        )
    elsewhere = golden.made_elsewhere(engine)
    if elsewhere:
        return None, f"{engine.role}: golden scores are not checked, they were made elsewhere ({'; '.join(elsewhere)})"
    return GoldenGuard(
        engine, golden, path, every
    ), f"{engine.role}: checked against {len(golden.pairs)} golden pairs of {path}"

"""Golden scores: pairs, their token ids, and the bits of their scores, which every aligned forward of the checkpoint repeats.

``golden_scores.jsonl`` lies beside a reward model's weights. Its first line is the record of what made the scores; every other line
is a pair: token ids, scores as hexadecimal floats, and for the first few pairs a digest of every layer's output, so that a
difference can be traced to the layer that it begins in.
"""

from __future__ import annotations

import json
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

GOLDEN_FILE = "golden_scores.jsonl"
#: Pairs of a file, and of them those with digests of layers.
NUM_PAIRS, NUM_TRACED = 64, 4
#: Fields of the record on which bits depend. Equal scores are promised where they are equal.
DECISIVE = ("dtype", "torch", "megatron_core", "device", "cpu", "cpu_capability", "cpu_flags", "kernel_limits")
#: Instructions of a CPU that decide which kernels oneDNN and MKL choose, as /proc/cpuinfo names them.
CPU_FLAGS = (
    *("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni"),
    *("amx_tile", "amx_bf16", "amx_int8", "amx_fp16"),
)
#: Variables that limit what these libraries use.
KERNEL_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")


@dataclass(frozen=True)
class GoldenPair:
    """One pair and what the model gave for it."""

    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_score: str  # float.hex
    rejected_score: str
    layers: list[tuple[str, str]] = field(default_factory=list)  # of the chosen sequence: layer, digest of its output


@dataclass(frozen=True)
class Golden:
    """The content of a file."""

    record: dict[str, Any]
    pairs: list[GoldenPair]

    def text(self) -> str:
        """JSON lines."""
        lines: list[dict[str, Any]] = [{"record": self.record}]
        lines += [{"pair": number, **vars(pair)} for number, pair in enumerate(self.pairs)]
        return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)

    def made_elsewhere(self, engine: ModelEngine) -> list[str]:
        """Return what differs between the record and here of what bits depend on: "cpu: X there, Y here".

        What an older file does not record cannot differ.
        """
        here = record_of(engine)
        names = [name for name in DECISIVE if name in self.record and self.record[name] != here[name]]
        return [f"{name}: {_shown(self.record[name])} there, {_shown(here[name])} here" for name in names]


def record_of(engine: ModelEngine) -> dict[str, Any]:
    """What makes an engine's scores."""
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
    """Golden scores of the first examples. Collective over the world.

    Args:
        engine: an aligned role with a score head.
        examples: at least one; as many as a file holds are taken.
    """
    examples = examples[:NUM_PAIRS]
    scores = pair_scores(engine, [(example.chosen_ids, example.rejected_ids) for example in examples])
    pairs = []
    for number, (example, (chosen, rejected)) in enumerate(zip(examples, scores, strict=True)):
        layers = layer_digests(engine, example.chosen_ids) if number < NUM_TRACED else []
        pairs.append(GoldenPair(example.chosen_ids, example.rejected_ids, chosen, rejected, layers))
    return Golden(record_of(engine), pairs)


def pair_scores(engine: ModelEngine, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[str, str]]:
    """(chosen, rejected) scores of (chosen, rejected) token ids, as hexadecimal floats. Collective over the world."""
    batch = collate_preferences([PreferenceExample(chosen, rejected, 0) for chosen, rejected in pairs])
    chosen = engine.forward(batch.chosen_ids, batch.chosen_lengths, scores_output).tolist()
    rejected = engine.forward(batch.rejected_ids, batch.rejected_lengths, scores_output).tolist()
    return [(one.hex(), other.hex()) for one, other in zip(chosen, rejected, strict=True)]


def read_golden(path: Path) -> Golden:
    """The content of a ``golden_scores.jsonl``.

    Raises:
        ValueError: it is not one; names file and line.
    """
    golden: Golden | None = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            content = json.loads(line)
            if golden is None:
                golden = Golden({"device": "cpu", **content["record"]}, [])  # older files were made on CPUs alone
                continue
            del content["pair"]
            content["layers"] = [(name, value) for name, value in content["layers"]]
            golden.pairs.append(GoldenPair(**content))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a line of golden scores ({error})") from error
    if golden is None or not golden.pairs:
        raise ValueError(f"{path}: holds no golden scores; write it anew by training or exporting the reward model")
    return golden


def check_golden(engine: ModelEngine, golden: Golden, path: Path, numbers: Sequence[int]) -> None:
    """Compute pairs anew and compare their bits. Collective over the world.

    Args:
        engine: the aligned role whose checkpoint the scores lie beside.
        path: of the file, for the message.
        numbers: of the pairs to compute.

    Raises:
        RunError: a score differs: file, pair, both values, and the layer that it begins in.
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
    """The first layer whose output differs from the recorded one for a pair's chosen sequence. Collective over the world."""
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
    """The name of the CPU, or the machine's architecture where the kernel does not say."""
    return _cpu_info("model name") or python_platform.machine()


def _cpu_flags() -> list[str]:
    """Those of ``CPU_FLAGS`` that the CPU has. A hypervisor may hide some, and the CPU's name with them."""
    found = _cpu_info("flags").split()
    return [flag for flag in CPU_FLAGS if flag in found]


def _cpu_info(name: str) -> str:
    """A field of the first core in /proc/cpuinfo; empty where there is none."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def _shown(value: Any) -> str:
    """A value of the record as a message shows it."""
    if isinstance(value, dict):
        return ", ".join(f"{name}={setting}" for name, setting in value.items()) or "none"
    return " ".join(value) or "none" if isinstance(value, list) else str(value)


#: Pairs that a running PPO computes anew each time, others the next time.
NUM_CHECKED = 8


@dataclass
class GoldenGuard:
    """Stops a run in which the reward model no longer scores as it did when it was trained."""

    engine: ModelEngine  # aligned, with a score head
    golden: Golden
    path: Path
    every: int  # steps between checks; 0: the first one alone
    checks: int = 0

    def check(self, step: int, *, first: bool = False) -> None:
        """Compute some pairs anew when it is time to. Collective over the world.

        Args:
            step: steps done.
            first: it is time in any case.

        Raises:
            RunError: a score differs.
        """
        if not first and not (self.every and step % self.every == 0):
            return
        start, size = self.checks * NUM_CHECKED, len(self.golden.pairs)
        numbers = sorted({number % size for number in range(start, start + NUM_CHECKED)})
        self.checks += 1
        with self.engine.on_device(phase="golden_scores"):
            check_golden(self.engine, self.golden, self.path, numbers)


def golden_guard(engine: ModelEngine, every: int) -> tuple[GoldenGuard | None, str]:
    """The guard of a role's checkpoint, or None where nothing can be promised; and a line that says which.

    Raises:
        ValueError: the file cannot be read, or holds scores of another dtype than a role computes in that is said to be aligned.
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

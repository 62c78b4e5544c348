"""Measure what turns cost and save: an actor and a critic that take turns on a device, against both resident, in one process.

Measured are bytes moved, seconds, GB/s in comparison with a plain copy (from pinned memory on CUDA), the peak memory of turns over that
of both resident, the seconds that the computation waits for switches, and the growth of memory over 20 cycles. On a machine without a
GPU the device's memory is host memory too: storages are really released and allocated again, copies are memcpy, and the copy lanes share
the cores with the training.

    python benchmarks/offload.py --model 125m --json offload.json
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from hetero_ppo.config.schema import (
    DdpConfig,
    Dtype,
    ModelConfig,
    OptimizerConfig,
    PpoConfig,
    ResidencyConfig,
    TrainedRoleConfig,
)
from hetero_ppo.distributed.groups import finish, initialise
from hetero_ppo.engines.loss_terms import LossTerm
from hetero_ppo.engines.losses import critic_loss_fn, sft_loss_fn
from hetero_ppo.engines.shared_device import SharedDevice
from hetero_ppo.engines.train_engine import TrainEngine
from hetero_ppo.memory.ledger import total
from hetero_ppo.memory.plan_storage import RoleStorage
from hetero_ppo.step.kinds import TRAINING, Kind
from hetero_ppo.step.phases import training_phase
from hetero_ppo.table import render_table
from hetero_ppo.types import AnswerInputs, ValueInputs
from megatron_bridge import platform
from megatron_bridge.platform.copies import allocated_bytes, pinned_host_memory, release_pinned

MIB, GB = 2**20, 1e9
#: name -> layers, hidden, MLP, heads, key-value heads, vocabulary
SHAPES = {
    "tiny": (2, 64, 128, 4, 2, 256),  # to see that the benchmark runs
    "30m": (8, 512, 1536, 8, 4, 4096),
    "125m": (12, 768, 2048, 12, 4, 32000),
    "1b": (16, 2048, 5632, 32, 8, 32000),
}
SCHEDULE = [training_phase("critic"), training_phase("actor")]


class Roles:
    """An actor and a critic on one device, trained in turns."""

    def __init__(self, model: Path, args: argparse.Namespace, *, offload: bool = True, overlap: bool = True) -> None:
        self.device = SharedDevice(ResidencyConfig(offload=offload, overlap=overlap), SCHEDULE)
        config = TrainedRoleConfig(
            model=ModelConfig(path=str(model), dtype=Dtype.bf16),
            optimizer=OptimizerConfig(lr=1e-5, distributed=args.distributed),
            ddp=DdpConfig(),
            micro_batch_size=args.rows,
        )
        self.actor = TrainEngine("actor", config, "lm", 1000, self.device)
        self.critic = TrainEngine("critic", config, "value", 1000, self.device)
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, self.actor.model.vocab_size, (args.rows, args.tokens), generator=generator)
        self.lengths = torch.full((args.rows,), args.tokens)
        self.mask = torch.ones(args.rows, args.tokens - 1, dtype=torch.bool)

    def train(self, engine: TrainEngine, steps: int) -> None:
        """Run optimizer steps inside a turn."""
        zeros = self.mask.float() * 0
        inputs: Any = AnswerInputs(self.mask) if engine.model.head == "lm" else ValueInputs(zeros, zeros + 1, self.mask)
        vocab_loss = sft_loss_fn(engine.model.vocab_size, engine.groups)
        loss = vocab_loss if engine.model.head == "lm" else critic_loss_fn(PpoConfig().algorithm)
        for _ in range(steps):
            parts = engine.microbatches(self.ids, self.lengths, inputs, range(len(self.ids)))
            engine.train_step([LossTerm(parts, loss, self.mask.sum().item())])

    def cycle(self, steps: int) -> None:
        """Run one turn of each role, with ``steps`` optimizer steps."""
        for engine in (self.critic, self.actor):
            with engine.on_device(grads=True, optimizer=True, phase=f"train_{engine.role}"):
                self.train(engine, steps)
                platform.synchronize()

    @property
    def resident_bytes(self) -> int:
        """Number of bytes of both roles."""
        return sum(role.num_bytes(frozenset(Kind)) for role in self.device.roles.values())


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the median wall seconds of one call, until the device is done with it."""
    return harness.median_seconds(work, repeats, settle=platform.synchronize)


def machine_copy_rates(num_bytes: int, repeats: int) -> dict[str, float]:
    """Measure the GB/s of plain copies between host and device, into existing memory and into memory that is allocated for the copy."""
    host = pinned_host_memory(num_bytes).fill_(1)
    device = torch.ones(num_bytes, dtype=torch.uint8, device=platform.device())

    def into_new_memory() -> None:
        torch.empty(num_bytes, dtype=torch.uint8, device=platform.device()).copy_(host, non_blocking=True)

    rates = {
        "to_host": num_bytes / median_seconds(lambda: host.copy_(device, non_blocking=True), repeats),
        "to_device": num_bytes / median_seconds(lambda: device.copy_(host, non_blocking=True), repeats),
        "to_new_device_memory": num_bytes / median_seconds(into_new_memory, repeats),
    }
    release_pinned(host)
    return {name: rate / GB for name, rate in rates.items()}


def measure_copies(roles: Roles, repeats: int) -> dict[str, float]:
    """Measure one role's copy to the host and one role's copy to the device, and both of a switch, in sequence and overlapped.

    Every byte that training changes is copied to the host. Gradient buffers are zeroed on the device, which is no copy: they are timed
    separately.
    """
    device, actor, critic = roles.device, roles.actor.residency, roles.critic.residency
    copied = actor.num_bytes(frozenset(Kind) - {Kind.grads})
    seconds: dict[str, list[float]] = {"out": [], "in": [], "zeros": [], "serial": [], "overlapped": []}

    def timed(name: str, work: Callable[[], None]) -> None:
        start = time.perf_counter()
        work()
        device.settle()
        seconds[name].append(time.perf_counter() - start)

    device.generator_turn("idle")
    device.settle()
    device.schedule = []
    for _ in range(repeats):
        device._bring_in("critic", critic.blocks)
        device.settle()
        critic.mark_changed(TRAINING)
        timed("out", lambda: device._send_out(critic.blocks))
        timed("in", lambda: device._bring_in("actor", [b for b in actor.blocks if b.kind is not Kind.grads]))
        timed("zeros", lambda: device._bring_in("actor", actor.blocks))
        seconds["serial"].append(seconds["out"][-1] + seconds["in"][-1] + seconds["zeros"][-1])
        actor.mark_changed(TRAINING)

        def swap() -> None:
            device._send_out(actor.blocks)
            device._bring_in("critic", critic.blocks)

        timed("overlapped", swap)
        device._send_out(critic.blocks)
        device.settle()
    device.schedule = SCHEDULE
    found = {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
    rates = {f"{name}_gb_s": copied / found[f"{name}_s"] / GB for name in ("out", "in")}
    return found | rates | {"bytes_each_way": copied}


def measure_turns(roles: Roles, cycles: int, steps: int) -> dict[str, float]:
    """Measure the median seconds of a cycle of both turns, and the seconds in it that the computation waits for switches."""
    roles.cycle(steps)
    seconds, waited = [], []
    for _ in range(cycles):
        roles.device.collect_cost()
        seconds.append(median_seconds(lambda: roles.cycle(steps), 1))
        waited.append(roles.device.collect_cost().waited_s)
    return {"cycle_s": statistics.median(seconds), "waited_s": statistics.median(waited)}


def planned_bytes(engine: TrainEngine) -> int:
    """Return the bytes that ``hetero-ppo plan`` counts for a role, from its configuration alone."""
    return sum(RoleStorage(engine.role, engine.config, 1).bytes_by_kind(0).values())


def resident_set_bytes() -> int:
    """Return the bytes of this process that are in RAM."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_leaks(roles: Roles, cycles: int) -> dict[str, float]:
    """Measure the growth of device and host bytes from the first cycle to the last, by the ledger, the device and the system."""
    looks = []
    for _ in range(cycles + 1):
        roles.cycle(1)
        roles.device.generator_turn("idle")
        roles.device.settle()
        gc.collect()
        device, host = roles.device.ledger.look()
        looks.append((total(device) + total(host), allocated_bytes() or 0, resident_set_bytes()))
    leaked = [last - first for first, last in zip(looks[0], looks[-1], strict=True)]
    return {"accounted": leaked[0], "device_reported": leaked[1], "resident_set": leaked[2]}


def measure(args: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Run all measurements, and print each when it is done."""
    roles = Roles(model, args)
    result: dict[str, Any] = {"role_bytes": roles.actor.residency.num_bytes(frozenset(Kind))}
    roles.device.peak_bytes = 0
    result["turns"] = measure_turns(roles, args.cycles, args.steps)
    result["peak_bytes"], result["resident_bytes"] = roles.device.peak_bytes, roles.resident_bytes
    print(f"turns: {result['turns']}", flush=True)
    if platform.HAS_CUDA:
        result["max_memory_allocated"] = torch.cuda.max_memory_allocated()
    result["copies"] = measure_copies(roles, args.repeats)
    print(f"copies: {result['copies']}", flush=True)
    result["machine_gb_s"] = machine_copy_rates(min(result["copies"]["bytes_each_way"], 1 << 30), args.repeats)
    print(f"machine: {result['machine_gb_s']}", flush=True)
    result["leaked"] = measure_leaks(roles, 20)
    planned = {engine.role: planned_bytes(engine) for engine in (roles.actor, roles.critic)}
    held = {role: roles.device.ledger.phases[f"train_{role}"] for role in planned}
    result["plan_bytes"], result["ledger_bytes"] = planned, {role: total(kinds) for role, kinds in held.items()}
    roles.device.close()
    del roles
    gc.collect()
    for name, options in {"serial": {"overlap": False}, "resident": {"offload": False}}.items():
        other = Roles(model, args, **options)
        result[name] = measure_turns(other, args.cycles, args.steps)
        print(f"{name}: {result[name]}", flush=True)
        other.device.close()
        del other
        gc.collect()
    return result | ratios(result)


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """Return the figures by which runs are compared."""
    copies, machine = result["copies"], result["machine_gb_s"]
    return {
        "peak_ratio": result["peak_bytes"] / result["resident_bytes"],
        "copy_rate_ratio": min(
            copies["out_gb_s"] / machine["to_host"], copies["in_gb_s"] / machine["to_new_device_memory"]
        ),
        "copy_rate_ratio_out": copies["out_gb_s"] / machine["to_host"],
        "copy_rate_ratio_in": copies["in_gb_s"] / machine["to_device"],
        "bare_switch_ratio": copies["overlapped_s"] / copies["serial_s"],
        "unhidden_switch_ratio": result["turns"]["waited_s"] / result["serial"]["waited_s"],
        "cycle_over_resident": result["turns"]["cycle_s"] / result["resident"]["cycle_s"],
        "plan_error_pct": max(
            100 * abs(result["plan_bytes"][role] / held - 1) for role, held in result["ledger_bytes"].items()
        ),
        "leaked_bytes_20_cycles": result["leaked"]["accounted"],
    }


def write_model(name: str, folder: Path) -> Path:
    """Write a Llama with random weights in bf16. Return its folder."""
    disable_progress_bar()
    layers, hidden, ffn, heads, kv_heads, vocab = SHAPES[name]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,  # actor and critic then are of one size
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    return folder


def table(result: dict[str, Any]) -> str:
    """Return the result for people."""
    copies, machine = result["copies"], result["machine_gb_s"]
    gib = 2**30
    rows = [
        ("one role, trained", f"{result['role_bytes'] / gib:.3f} GiB"),
        ("both resident", f"{result['resident_bytes'] / gib:.3f} GiB"),
        ("peak of turns", f"{result['peak_bytes'] / gib:.3f} GiB, {result['peak_ratio']:.3f} of both resident"),
        ("way out", f"{copies['out_s']:.3f} s, {copies['out_gb_s']:.2f} GB/s (plain copy {machine['to_host']:.2f})"),
        (
            "way in",
            (
                f"{copies['in_s']:.3f} s, {copies['in_gb_s']:.2f} GB/s (plain copy {machine['to_device']:.2f}, "
                f"into new memory {machine['to_new_device_memory']:.2f})"
            ),
        ),
        ("gradient buffers", f"{copies['zeros_s']:.3f} s to come in as zeros"),
        ("bare switch", f"{copies['overlapped_s']:.3f} s overlapped, {copies['serial_s']:.3f} s one after the other"),
        (
            "waited per cycle",
            f"{result['turns']['waited_s']:.3f} s, {result['serial']['waited_s']:.3f} s without overlap",
        ),
        (
            "a cycle of both turns",
            (
                f"{result['turns']['cycle_s']:.3f} s; {result['serial']['cycle_s']:.3f} s without overlap; "
                f"{result['resident']['cycle_s']:.3f} s with both resident"
            ),
        ),
        ("plan", f"{result['plan_error_pct']:.3f} % off what the storages hold"),
        ("leaked in 20 cycles", ", ".join(f"{name} {num_bytes} bytes" for name, num_bytes in result["leaked"].items())),
    ]
    return render_table(rows, "ll")


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--model", choices=SHAPES, default="1b" if platform.HAS_CUDA else "125m", help="size of a role")
    parser.add_argument("--rows", type=int, default=8, help="number of sequences of a training step")
    parser.add_argument("--tokens", type=int, default=128, help="number of tokens of a sequence")
    parser.add_argument("--steps", type=int, default=4, help="number of optimizer steps of a turn")
    parser.add_argument("--cycles", type=int, default=3, help="number of cycles of both turns that are timed")
    parser.add_argument("--repeats", type=int, default=5, help="number of repeats of the bare copies")
    parser.add_argument("--distributed", action="store_true", help="use the distributed optimizer")
    parser.add_argument("--threads", type=int, default=1, help="number of CPU threads of the computation")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="offload-") as folder, harness.one_rank():
        initialise(10.0)
        result = measure(args, write_model(args.model, Path(folder) / args.model))
        finish()
    figures = {"device": platform.device().type, **harness.settings(args), **result}
    harness.report("offload", figures, args.json, text=table(result))


if __name__ == "__main__":
    main()

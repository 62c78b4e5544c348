"""GPU checks of memory and copies: turns next to another process, copies during kernels, the plan's activations, a whole PPO run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tests.gpu.worlds import Neighbour, save_model, world

TESTS = Path(__file__).resolve().parents[1]
MIB = 2**20
#: Metrics of a step that are times and rates, or depend on them.
TIMES = re.compile(r"^(time|perf|timing|throughput|memory|switch|trace|residency|pipeline|weight_sync)|_s$")


def _synthetic_roles(num_bytes: int, **options: Any) -> Any:
    """Make two trained roles and one that only runs forward, with so many bytes of each kind, on a device that they share."""
    from hetero_ppo.config.schema import ResidencyConfig
    from hetero_ppo.engines.residency import RoleResidency
    from hetero_ppo.engines.shared_device import SharedDevice
    from hetero_ppo.step.kinds import Kind
    from hetero_ppo.step.phases import ppo_phases

    device = SharedDevice(ResidencyConfig(), ppo_phases(reward_models=[], actor_scores_old=True), **options)
    trained = (Kind.params, Kind.grads, Kind.main_params, Kind.moments)
    for name, kinds in (("critic", trained), ("actor", trained), ("reference", (Kind.params,))):
        tensors = {
            kind: [torch.zeros(num_bytes // 16, dtype=torch.uint8, device="cuda") for _ in range(16)] for kind in kinds
        }
        device.add(RoleResidency(name, tensors, [], lambda: None))
    return device


def neighbour(cpu: bool) -> dict[str, Any]:
    """Take turns with a process that allocates the generator's share at each wake, as vLLM does."""
    from hetero_ppo.rollout.generator import Capabilities, NullGenerator
    from hetero_ppo.step.kinds import TRAINING, Kind
    from hetero_ppo.trainers.ppo_turns import GeneratorTurns

    class Generator(NullGenerator):
        is_here = True

        def __init__(self, process: Neighbour, share: int) -> None:
            super().__init__(Capabilities(can_sleep=True))
            self.process, self.share, self.answers = process, share, list[str]()

        def wake(self, *, weights_only: bool = False) -> None:
            self.answers.append(self.process.hold(self.share // 4 if weights_only else self.share))

        def sleep(self) -> None:
            self.process.hold(0)

    free, _ = torch.cuda.mem_get_info()
    kind = free // 10 // 16 * 16  # a training turn takes 4 of 10 parts, its activations 2, the generator 6
    facts: dict[str, Any] = {"turn_gib": round(4 * kind / 2**30, 1)}
    with world(), Neighbour() as process:
        device = _synthetic_roles(kind)
        generator = Generator(process, 6 * kind)
        turns = GeneratorTurns(generator, device, torch.distributed.group.WORLD, 0)
        for _ in range(3):
            with turns.generating():
                pass
            for role in ("critic", "actor"):
                with device.turn(role, TRAINING, f"train_{role}"):
                    device.require(role, TRAINING, "training")
                    activations = torch.empty(2 * kind, dtype=torch.uint8, device="cuda")
                    device.roles[role].mark_changed(TRAINING)
                    del activations
            with device.turn("actor", frozenset({Kind.params}), "weight_sync"):
                turns.wake_for_sync()
            turns.sleep()
        facts |= {"allocated_gib": round(torch.cuda.memory_allocated() / 2**30, 2), "wakes": len(generator.answers)}
        facts["reserved_gib"] = round(torch.cuda.memory_reserved() / 2**30, 2)
        device.close()
    refused = [answer for answer in generator.answers if answer != "ok"]
    assert not refused, refused[0]
    return facts


def copies(cpu: bool) -> dict[str, Any]:
    """Copy a role to the device during a long queue of kernels. Measure its rate, and whether it arrives before the kernels end."""
    from hetero_ppo.step.kinds import TRAINING, Kind

    with world():
        device = _synthetic_roles(2048 * MIB)
        for role in ("critic", "actor"):
            with device.turn(role, TRAINING, f"train_{role}"):
                device.require(role, TRAINING, "training")
        device.settle()
        matrix = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
        device.limit *= 2
        with device.turn("critic", frozenset({Kind.params}), "values", then={"actor": frozenset({Kind.params})}):
            kernels = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            kernels[0].record()
            for _ in range(1500):
                matrix = torch.mm(matrix, matrix) * 1e-4
            kernels[1].record()
            begin = time.perf_counter()
            device._wait(device.roles["actor"].blocks)
            seconds = time.perf_counter() - begin
            running = not kernels[1].query()
            kernels[1].synchronize()
        facts = {
            "kernels_s": round(kernels[0].elapsed_time(kernels[1]) / 1e3, 2),
            "copy_s": round(seconds, 3),
            "gb_s": round(2048 * MIB / 1e9 / seconds, 1),
        }
        device.close()
    assert running, f"the copies ended after the kernels: {facts}"
    return facts


def activations(cpu: bool) -> dict[str, Any]:
    """Compare the plan's estimate of a training step's activations with what the allocator had at most."""
    from hetero_ppo.config.schema import Dtype, ModelConfig, TrainedRoleConfig
    from hetero_ppo.engines.loss_terms import LossTerm
    from hetero_ppo.engines.losses import sft_loss_fn
    from hetero_ppo.engines.train_engine import TrainEngine
    from hetero_ppo.memory.plan_activations import Work, training_bytes
    from hetero_ppo.types import AnswerInputs

    folder, vocab, facts = Path(tempfile.mkdtemp(prefix="gpu_check_")), 32768, dict[str, Any]()
    save_model(folder, layers=12, hidden=1024, vocab=vocab)
    with world():
        for rows, length, recompute in ((4, 1024, None), (1, 4096, None), (4, 2048, "full")):
            config = TrainedRoleConfig(
                model=ModelConfig(path=str(folder), dtype=Dtype.bf16),
                micro_batch_size=rows,
                packing=False,
                recompute=recompute,
            )
            engine = TrainEngine("actor", config, "lm", 10)
            ids, lengths = torch.randint(0, vocab, (rows, length)), torch.full((rows,), length)
            parts = engine.microbatches(
                ids, lengths, AnswerInputs(torch.ones(rows, length - 1, dtype=torch.bool)), range(rows)
            )
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            engine.train_step([LossTerm(parts, sft_loss_fn(vocab, engine.groups), rows * (length - 1))])
            measured = torch.cuda.max_memory_allocated() - before
            planned = training_bytes(engine.model.bridge, "lm", recompute, 0, Work(rows, length, 1))
            facts[f"{rows}x{length}{'_full' if recompute else ''}"] = round(measured / planned, 3)
            del engine
    assert all(ratio < 1.1 for ratio in facts.values()), f"measured over planned: {facts}"
    return facts


def write_ppo(folder: Path, steps: int, every: int, dtype: str) -> None:
    """Write inputs and the configuration of a PPO run with the actor as generator: ``ppo.yaml``; a checkpoint ``every`` so many steps."""
    sys.path.insert(0, str(TESTS.parent / "benchmarks"))
    from ppo_step_inputs import ModelShape, Work, our_config, write_config, write_inputs

    shape, work = (
        ModelShape("tiny", 2, 64, 128, 4, 2, 64),
        Work(prompts_per_step=8, prompt_tokens=6, response_tokens=8, minibatch=4),
    )
    config = our_config(write_inputs(shape, work, steps, folder), work, dtype, steps, folder / "run", 4)
    config["algorithm"] |= {"old_log_probs": "actor"}
    config["rollout"] = {"engine": "megatron", "max_num_seqs": 8, "sampling": config["rollout"]["sampling"]}
    config["residency"] = {"offload": True}
    config["checkpoint"] |= {"every": every, "keep": 10}
    write_config(config, folder / "ppo.yaml")


def ppo_run(folder: Path, cpu: bool) -> dict[str, Any]:
    """Run PPO with the actor as generator, resume it from the middle in another folder, and compare metrics."""
    steps, middle = (2, 1) if cpu else (4, 2)
    write_ppo(folder, steps, middle, "fp32" if cpu else "bf16")
    text = launch(folder, f"run.dir={folder / 'run'}")
    launch(folder, f"run.dir={folder / 'again'}", f"checkpoint.load={folder / 'run'}", f"checkpoint.step={middle}")
    rows, again = metrics(folder / "run"), metrics(folder / "again")
    different = sorted(
        {
            name
            for step in range(middle + 1, steps + 1)
            for name, value in rows[step].items()
            if value != again[step].get(name)
        }
    )
    assert not different, f"metrics of the resumed run differ: {different[:8]}"
    errors = re.findall(r"largest difference of a phase: ([\d.]+) %", text)
    return {
        "steps": steps,
        "metrics_compared": len(rows[steps]),
        "plan_error_pct": float(errors[-1]) if errors else None,
    }


def launch(folder: Path, *overrides: str, processes: int = 1) -> str:
    """Train as ``ppo.yaml`` says, with these overrides. Returns the output."""
    command = [sys.executable, "-m", "hetero_ppo.cli.launcher", "--nproc-per-node", str(processes), "--standalone"]
    command += ["-m", "hetero_ppo.cli.main", "train", "--config", str(folder / "ppo.yaml"), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, check=False)
    assert done.returncode == 0, f"exit status {done.returncode}:\n{(done.stdout + done.stderr)[-1500:]}"
    return done.stdout + done.stderr


def metrics(run: Path) -> dict[int, dict[str, float]]:
    """Return step -> name -> value of a run, without times and rates."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        row["step"]: {name: value for name, value in row["metrics"].items() if not TIMES.search(name)} for row in rows
    }

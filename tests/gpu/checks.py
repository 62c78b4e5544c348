"""The checks of ``scripts/gpu_check.sh``, in the order of what a failure would cost: docs/gpu.md has the table.

Every function takes whether it is a rehearsal on the CPU, where sizes are small, and returns what it measured. A check fails by an exception.
"""

from __future__ import annotations

import functools
import inspect
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from tests.gpu import checks_memory
from tests.gpu.check_types import Check, Skip
from tests.gpu.worlds import save_model, world

TESTS = Path(__file__).resolve().parents[1]


def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="gpu_check_"))


def _pytest(arguments: list[str]) -> dict[str, Any]:
    """Run pytest in this process; every test that was not skipped has to pass."""
    import pytest

    class Counts:
        def __init__(self) -> None:
            self.found: dict[str, int] = {}

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                self.found[report.outcome] = self.found.get(report.outcome, 0) + 1

    counts = Counts()
    status = pytest.main(
        ["-q", "-p", "no:cacheprovider", "-W", "ignore", f"--rootdir={TESTS.parent}", *arguments], plugins=[counts]
    )
    assert status == 0, f"pytest ended with {status}"
    return counts.found


def premises(cpu: bool) -> dict[str, Any]:
    """Check what the other checks rely on: torch's private functions, the device's limits, the rate of pinned copies."""
    from torch.optim._functional import adam
    from torch.optim.adamw import adamw

    for function in (adam, adamw):
        missing = {"fused", "grad_scale", "lr", "beta1"} - set(inspect.signature(function).parameters)
        assert not missing, f"{function.__name__} of torch {torch.__version__} has no {missing}"
    facts: dict[str, Any] = {"varlen_attn": hasattr(__import__("torch.nn.attention", fromlist=["varlen"]), "varlen")}
    if cpu:
        return facts
    from hetero_ppo.rollout.servers.compute_mode import check_compute_mode

    check_compute_mode()
    free, total = torch.cuda.mem_get_info()
    facts |= {"free_gib": round(free / 2**30, 1), "total_gib": round(total / 2**30, 1)}
    with world():
        from megatron_bridge.platform.copies import pinned_host_memory, release_pinned

        host, device = pinned_host_memory(2**30), torch.empty(2**30, dtype=torch.uint8, device="cuda")
        for name, target, source in (("in", device, host), ("out", host, device)):
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(4):
                target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            facts[f"{name}_gb_s"] = round(4 * 2**30 / 1e9 / (time.perf_counter() - begin), 1)
        release_pinned(host)
    return facts


def adam(cpu: bool) -> dict[str, Any]:
    """Compare three steps of the project's Adam with torch's."""
    from megatron_bridge.platform.adam import Adam

    device = "cpu" if cpu else "cuda"
    torch.manual_seed(0)
    start = [torch.randn(257, 33), torch.randn(4097)]
    gradients = [[torch.randn_like(p) for p in start] for _ in range(3)]
    worst = 0.0
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    pairs = []
    for kind in (Adam, functools.partial(torch.optim.AdamW, foreach=False)):
        parameters = [torch.nn.Parameter(p.to(device, copy=True)) for p in start]
        optimizer = kind(parameters, **options)
        for step in gradients:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.to(device)
            optimizer.step()
        pairs.append(parameters)
    for ours, theirs in zip(*pairs, strict=True):
        worst = max(worst, float((ours - theirs).abs().max().detach()))
    assert worst < 1e-6, f"weights differ by {worst}"
    return {"max_difference": worst}


def steps_after_events(cpu: bool) -> dict[str, Any]:
    """Check that a step after a save, a load, an export, an evaluation or a sync has the bits of a step without it."""
    return _pytest([str(TESTS / "numerics" / "test_steps_after_events.py")])


def residency(cpu: bool) -> dict[str, Any]:
    """Check turns on the device: streams, bits, guards."""
    return _pytest([str(TESTS / "numerics" / "test_residency.py"), *(["-k", "bits_are_those and bf16"] if cpu else [])])


def forward_and_backward(cpu: bool) -> dict[str, Any]:
    """Compare a bf16 role on the device with transformers in fp32 on the CPU: padded, packed, recomputed."""
    from hetero_ppo.config.schema import Dtype, ModelConfig, TrainedRoleConfig
    from hetero_ppo.engines.loss_terms import LossTerm
    from hetero_ppo.engines.losses import sft_loss_fn
    from hetero_ppo.engines.outputs import log_probs_output
    from hetero_ppo.engines.train_engine import TrainEngine
    from hetero_ppo.types import AnswerInputs

    layers, hidden, vocab, lengths = (2, 64, 101, [9, 30]) if cpu else (8, 1024, 8192, [700, 4096])
    folder, facts = _folder(), dict[str, Any]()
    reference = save_model(folder, layers=layers, hidden=hidden, vocab=vocab)
    ids = torch.randint(0, vocab, (2, max(lengths)), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(max(lengths) - 1) < torch.tensor(lengths)[:, None] - 1
    log_probs = torch.zeros(mask.shape)
    for row, length in enumerate(lengths):
        logits = reference(ids[row : row + 1, :length]).logits[0, :-1].float()
        taken = logits.log_softmax(-1).gather(-1, ids[row, 1:length, None])[:, 0]
        log_probs[row, : length - 1] = taken.detach()
        (-taken.sum() / mask.sum()).backward()
    norm = float(torch.stack([p.grad.norm() for p in reference.parameters()]).norm())
    with world():
        for packing in (False, True):
            for recompute in (None, "full"):
                config = TrainedRoleConfig(
                    model=ModelConfig(path=str(folder), dtype=Dtype.bf16),
                    micro_batch_size=2,
                    packing=packing,
                    recompute=recompute,
                )
                engine = TrainEngine("actor", config, "lm", 10)
                output = log_probs_output(temperature=1.0, vocab_size=vocab, groups=engine.groups)
                found = engine.model.forward(ids, torch.tensor(lengths), output)
                error = float((found - log_probs)[mask].abs().mean())
                parts = engine.microbatches(ids, torch.tensor(lengths), AnswerInputs(mask), range(2))
                result = engine.train_step([LossTerm(parts, sft_loss_fn(vocab, engine.groups), int(mask.sum()))])
                name = f"{'packed' if packing else 'padded'}{'_recomputed' if recompute else ''}"
                facts[name] = [round(error, 5), round(result.grad_norm / norm, 4)]
                assert error < 0.02, f"{name}: mean |log-prob difference| {error}"
                assert abs(result.grad_norm / norm - 1) < 0.05, (
                    f"{name}: gradient norm {result.grad_norm}, reference {norm}"
                )
    return facts


def aligned(cpu: bool) -> dict[str, Any]:
    """Run the self-check of aligned roles, and measure what alignment costs."""
    from hetero_ppo.config.schema import Dtype, ModelConfig, RoleConfig
    from hetero_ppo.engines.model_engine import ModelEngine
    from hetero_ppo.engines.outputs import log_probs_output
    from hetero_ppo.reward.self_check import check_alignment

    layers, hidden, vocab, rows, length = (2, 64, 101, 2, 40) if cpu else (8, 1024, 8192, 8, 1024)
    folder, seconds = _folder(), dict[bool, float]()
    save_model(folder, layers=layers, hidden=hidden, vocab=vocab)
    ids, lengths = torch.randint(0, vocab, (rows, length)), torch.full((rows,), length)
    with world():
        for is_aligned in (False, True):
            config = RoleConfig(
                model=ModelConfig(path=str(folder), dtype=Dtype.bf16), micro_batch_size=rows, aligned=is_aligned
            )
            engine = ModelEngine("reference", config, "lm")
            output = log_probs_output(
                temperature=1.0, vocab_size=vocab, groups=engine.groups, num_parts=engine.vocab_parts
            )
            engine.forward(ids, lengths, output)
            begin = time.perf_counter()
            for _ in range(3):
                engine.forward(ids, lengths, output)
            seconds[is_aligned] = time.perf_counter() - begin
        line = check_alignment(engine)
    return {"compared": line.split(": ", 2)[-1], "time_over_plain": round(seconds[True] / seconds[False], 2)}


def transports(cpu: bool) -> dict[str, Any]:
    """Check the transport of weights by CUDA IPC and by a process group."""
    return _pytest(
        [str(TESTS / "unit" / name) for name in ("test_rollout_transports.py", "test_rollout_device_buckets.py")]
    )


def ppo(cpu: bool) -> dict[str, Any]:
    """Run PPO with the actor as generator, resume its second half from a checkpoint, and compare metrics, and ledger with plan."""
    return checks_memory.ppo_run(_folder(), cpu)


def synchronisations(cpu: bool) -> dict[str, Any]:
    """Count how often a forward and a training step make the host wait for the device."""
    from hetero_ppo.config.schema import Dtype, ModelConfig, TrainedRoleConfig
    from hetero_ppo.engines.loss_terms import LossTerm
    from hetero_ppo.engines.losses import sft_loss_fn
    from hetero_ppo.engines.outputs import log_probs_output
    from hetero_ppo.engines.train_engine import TrainEngine
    from hetero_ppo.types import AnswerInputs

    folder = _folder()
    save_model(folder, layers=4, hidden=256, vocab=1024)
    ids, lengths = torch.randint(0, 1024, (4, 64)), torch.full((4,), 64)
    facts: dict[str, Any] = {}
    with world():
        config = TrainedRoleConfig(model=ModelConfig(path=str(folder), dtype=Dtype.bf16), micro_batch_size=4)
        engine = TrainEngine("actor", config, "lm", 10)
        output = log_probs_output(temperature=1.0, vocab_size=1024, groups=engine.groups)
        parts = engine.microbatches(ids, lengths, AnswerInputs(torch.ones(4, 63, dtype=torch.bool)), range(4))
        work = {
            "forward": lambda: engine.model.forward(ids, lengths, output),
            "step": lambda: engine.train_step([LossTerm(parts, sft_loss_fn(1024, engine.groups), 4 * 63)]),
        }
        for name, function in work.items():
            function()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                function()
            torch.cuda.set_sync_debug_mode("default")
            facts[name] = sum("synchroniz" in str(one.message) for one in caught)
    return facts


CHECKS = [
    Check("premises", "what the other checks assume", 90, premises),
    Check("adam", "the project's Adam on the device", 60, adam),
    Check("steps after events", "gradients after a save (finding A3)", 180, steps_after_events),
    Check("residency", "turns: streams, bits, guards", 240, residency),
    Check(
        "turns next to another process",
        "another process finds memory at each wake (A2, C2)",
        120,
        checks_memory.neighbour,
        on_cpu=False,
    ),
    Check(
        "copies under a forward",
        "the next role comes in while kernels run (C1)",
        90,
        checks_memory.copies,
        on_cpu=False,
    ),
    Check("forward and backward", "the local layer spec in bf16", 240, forward_and_backward),
    Check("aligned", "equal bits over batches on the device (B2)", 240, aligned),
    Check("transports", "weights by CUDA IPC (C3)", 120, transports),
    Check("PPO", "the main job: run, checkpoint, resume, ledger", 240, ppo),
    Check("synchronisations", "how often the host waits (C5)", 90, synchronisations, on_cpu=False),
    Check("activations", "the plan's activations against the allocator", 120, checks_memory.activations, on_cpu=False),
]
__all__ = ["CHECKS", "Skip"]

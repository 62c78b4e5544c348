"""Time make-experience serial and pipelined, and compare both with generation alone, forwards alone, and the ideal of the two.

The work: random Llama models (2.4m, 30m: see ``ppo_step.py``), ``--prompts`` prompts of 16 tokens, and four forwards with every switch
of residency. Response lengths are fixed, or drawn from a long-tailed (log-normal) distribution. Each prompt has its length, and the
end-of-sequence token does not stop a response. On a CPU the trainer has one core and the generator another, in every measurement.
A round takes all measurements in turn; medians over rounds are reported.

    python benchmarks/make_experience.py --model 2.4m --json result.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import harness
import logprob_memory
from ppo_step_inputs import SHAPES, Work, our_config, write_config, write_inputs

from hetero_ppo.config.derived import actor_generates
from hetero_ppo.config.load import load_config
from hetero_ppo.experience.pending_rollout import PendingRollout
from hetero_ppo.experience.pipeline import Pipeline
from hetero_ppo.observability.timers import PhaseTimer
from hetero_ppo.rollout.generator import Capabilities, GenerationRequest, Generator, NullGenerator
from hetero_ppo.rollout.vllm import VllmGenerator
from hetero_ppo.trainers.open_ppo import open_ppo
from hetero_ppo.trainers.ppo import PpoTrainer
from hetero_ppo.trainers.run import start_run
from hetero_ppo.trainers.stopping import StopRequests
from hetero_ppo.table import render_table
from hetero_ppo.types import Experience, OnResponse, PromptBatch, Response, Rollout
from megatron_bridge import platform

GB = 1e9
DTYPES = ("fp32", "bf16")
NUM_WARM_UP = 1


def pin_to(core: int) -> None:
    """Pin this process to one core: all its threads, and the processes that it starts later."""
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # a thread that has just ended
            os.sched_setaffinity(int(task), {core})


def draw_lengths(kind: str, count: int, longest: int, seed: int) -> list[int]:
    """Return the number of response tokens of each prompt.

    Args:
        kind: ``fixed`` for half of ``longest`` everywhere, or ``long_tailed`` for a log-normal distribution with half of that mean.
        count: Number of prompts.
        longest: Number of tokens of the longest response.
        seed: Seed of the distribution.
    """
    if kind == "fixed":
        return [longest // 2] * count
    generator = random.Random(seed)
    sigma = 0.9
    mu = torch.tensor(longest / 4.0).log().item() - sigma**2 / 2  # of mean longest / 4
    return [max(4, min(longest, round(generator.lognormvariate(mu, sigma)))) for _ in range(count)]


class Answered(NullGenerator):
    """A generator that returns recorded responses, in the order in which they were completed. It computes nothing."""

    is_here = True

    def __init__(self, rollout: Rollout, n: int) -> None:
        super().__init__(Capabilities())
        starts, ends = rollout.prompt_lengths.tolist(), rollout.sequence_lengths.tolist()
        self._answers = [
            Response(
                rollout.token_ids[row, starts[row] : ends[row]].tolist(),
                rollout.rollout_log_probs[row, starts[row] - 1 : ends[row] - 1].tolist(),
                "length",
                rollout.weight_version[row],
            )
            for row in range(rollout.batch_size)
        ]
        self._order = sorted(range(rollout.batch_size), key=lambda row: (rollout.chunk_index[row], row))
        self._n = n

    def generate(
        self,
        request: GenerationRequest,
        *,
        on_response: OnResponse | None = None,
        on_stalled: Callable[[], None] | None = None,
    ) -> list[list[Response]]:
        assert on_response is not None
        for row in self._order:
            on_response(row // self._n, row % self._n, self._answers[row])
        return [self._answers[start : start + self._n] for start in range(0, len(self._answers), self._n)]


@dataclass
class Bench:
    """A trainer with a started generator, and one batch of prompts."""

    trainer: PpoTrainer
    prompts: PromptBatch
    chunk_size: int

    def started(self, generator: Generator, lengths: list[int]) -> PendingRollout:
        """Wake the generator, start a rollout and return it."""
        self.trainer.turns.wake()
        request = GenerationRequest(self.prompts, self.trainer.config.rollout.sampling, n=1, seed=1, max_tokens=lengths)
        return PendingRollout(
            generator, request, dist.group.WORLD, generator_rank=0, version="step0", chunk_size=self.chunk_size
        ).start()

    def generate_alone(self, lengths: list[int]) -> tuple[float, float]:
        """Generate without forwards. Return the seconds of the whole generation, and those to its first chunk."""
        start = time.perf_counter()
        pending = self.started(self.trainer.generator, lengths)
        pending.next_chunks()
        first = time.perf_counter() - start
        while not pending.finished:
            pending.next_chunks()
        self.trainer.turns.sleep()
        return pending.seconds, first

    def make(self, generator: Generator, lengths: list[int], *, overlap: bool) -> tuple[float, Experience]:
        """Run make-experience. Return its wall seconds and the experience."""
        pipeline = Pipeline(self.trainer.maker, overlap)
        start = time.perf_counter()
        pending = self.started(generator, lengths)
        experience = pipeline.make(pending, PhaseTimer(), when_generated=self.trainer.turns.sleep)
        return time.perf_counter() - start, experience


def measure_lengths(bench: Bench, lengths: list[int], rounds: int) -> dict[str, Any]:
    """Measure one distribution of lengths."""
    generator = bench.trainer.generator

    def one_round(number: int) -> tuple[dict[str, float], float, bool, dict[str, float]]:
        generate, first = bench.generate_alone(lengths)
        serial, _ = bench.make(generator, lengths, overlap=False)
        pipelined, made = bench.make(generator, lengths, overlap=True)
        forwards, again = bench.make(Answered(made.rollout, 1), lengths, overlap=False)
        seconds = {"generate": generate, "first": first, "forwards": forwards, "serial": serial, "pipelined": pipelined}
        return seconds, generate / made.metrics["rollout/generate_s"], same_bits(made, again), made.metrics

    measured = harness.alternate({"round": one_round}, rounds, num_warm_up=NUM_WARM_UP)["round"]
    each, rates, identical, metrics = zip(*measured, strict=True)
    seconds = {name: [one[name] for one in each] for name in each[0]}
    return summary(seconds, rates, all(identical), lengths, bench.chunk_size, metrics[-1])


def summary(
    seconds: dict[str, list[float]],
    rates: Sequence[float],
    identical: bool,
    lengths: list[int],
    chunk_size: int,
    last: dict[str, float],
) -> dict[str, Any]:
    """Return the medians, and the ratios within a round.

    Args:
        seconds: Seconds of every round, by measurement.
        rates: Ratio of every round of the rate of generation during forwards over that of generation alone.
        identical: True when the pipeline made the bits of its serial twin in every round.
        lengths: Number of response tokens of each prompt.
        chunk_size: Number of responses of a chunk.
        last: Metrics of the last round.
    """
    chunk_share = min(1.0, chunk_size / len(lengths))  # the share of a whole chunk

    def ideal(generate: float, first: float, forwards: float) -> float:
        fill = forwards * chunk_share if generate >= forwards else first
        return max(generate, forwards) + fill

    ideals = list(map(ideal, seconds["generate"], seconds["first"], seconds["forwards"]))
    found = {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
    return found | {
        "ideal_s": statistics.median(ideals),
        "pipelined_over_ideal": harness.median_ratio(seconds["pipelined"], ideals),
        "pipelined_over_serial": harness.median_ratio(seconds["pipelined"], seconds["serial"]),
        "generation_rate_ratio": statistics.median(rates),
        "identical_to_serial": identical,
        "num_chunks": last["pipeline/num_chunks"],
        "num_waves": last["pipeline/num_waves"],
        "response_tokens": sum(lengths),
        "longest_response": max(lengths),
    }


def same_bits(one: Experience, other: Experience) -> bool:
    """Return True when every tensor of the two experiences and of their rollouts is equal."""

    def tensors(record: Experience | Rollout) -> list[Tensor]:
        values = [getattr(record, entry.name) for entry in fields(record)]
        return [value for value in values if isinstance(value, Tensor)]

    pairs = zip(tensors(one) + tensors(one.rollout), tensors(other) + tensors(other.rollout), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


SYNC_FIGURES = ("sync_s", "sync_write_s", "sync_checksum_s", "sync_probe_s", "sync_bytes", "sync_gb_s", "memcpy_gb_s")


def measure_sync(trainer: PpoTrainer, repeats: int) -> dict[str, Any]:
    """Measure weight syncs with all their checks, and a plain copy of as many bytes.

    Without syncs every figure is None, and ``sync_none`` is the reason.
    """
    if actor_generates(trainer.config):
        reason = "the actor itself generates (rollout.engine=megatron): there is no second copy of the weights"
        return {**dict.fromkeys(SYNC_FIGURES), "sync_none": reason}
    trainer.sync_weights(1)  # warm-up
    stats = []
    for step in range(2, repeats + 2):
        trainer.sync_weights(step)
        assert isinstance(trainer.generator, VllmGenerator) and trainer.generator.last_sync is not None
        stats.append(trainer.generator.last_sync)
    source = torch.ones(stats[0].num_bytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy_s = harness.median_seconds(lambda: target.copy_(source), repeats)
    figures = (
        statistics.median(one.seconds for one in stats),
        statistics.median(one.write_s for one in stats),
        statistics.median(one.checksum_s for one in stats),
        statistics.median(one.probe_s for one in stats),
        stats[0].num_bytes,
        statistics.median(one.gb_s for one in stats),
        stats[0].num_bytes / copy_s / GB,
    )
    return {**dict(zip(SYNC_FIGURES, figures, strict=True)), "sync_none": None}


def table(lengths: dict[str, dict[str, Any]], sync: dict[str, Any]) -> str:
    """Return the result for people."""
    rows = [
        ("generation alone, s", "generate_s", "{:.3f}"),
        ("forwards alone, s", "forwards_s", "{:.3f}"),
        ("serial make-experience, s", "serial_s", "{:.3f}"),
        ("pipelined make-experience, s", "pipelined_s", "{:.3f}"),
        ("ideal, s", "ideal_s", "{:.3f}"),
        ("pipelined over ideal", "pipelined_over_ideal", "{:.3f}"),
        ("pipelined over serial", "pipelined_over_serial", "{:.3f}"),
        ("rate of generation during forwards", "generation_rate_ratio", "{:.3f}"),
        ("bits of the serial twin", "identical_to_serial", "{}"),
        ("chunks", "num_chunks", "{:.0f}"),
        ("waves", "num_waves", "{:.0f}"),
        ("response tokens", "response_tokens", "{}"),
    ]
    cells = [["", *lengths], *([title, *(text.format(r[key]) for r in lengths.values())] for title, key, text in rows)]
    return "\n".join([render_table(cells, "l" + "r" * len(lengths)), sync_line(sync)])


def sync_line(sync: dict[str, Any]) -> str:
    """Return the weight sync for people."""
    if sync["sync_none"] is not None:
        return f"weight sync: none, {sync['sync_none']}"
    return (
        f"weight sync: {sync['sync_s']:.3f} s for {sync['sync_bytes'] / 2**20:.1f} MiB, {sync['sync_gb_s']:.3f} GB/s (plain copy "
        f"{sync['memcpy_gb_s']:.1f} GB/s). Writing and hashing took {sync['sync_write_s']:.3f} s of it, the servers' checksums "
        f"{sync['sync_checksum_s']:.3f} s. The probe prompt after it took {sync['sync_probe_s']:.3f} s"
    )


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run all measurements in this process."""
    cores = sorted(os.sched_getaffinity(0))
    if not platform.HAS_CUDA and len(cores) < 2:
        raise SystemExit("this benchmark needs two cores: one for the trainer and one for the generator")
    work = Work(prompts_per_step=args.prompts, response_tokens=args.longest, minibatch=args.prompts)
    inputs = write_inputs(SHAPES[args.model], work, 1, folder)
    config = our_config(inputs, work, args.dtype, 1, folder / "run", args.micro_batch)
    config["algorithm"] |= {"old_log_probs": "actor"}
    config["rollout"] |= {"num_servers": 1, "max_num_seqs": args.running_batch, "server_threads": 1}
    config["residency"] = {"offload": True}
    config["pipeline"] = {"chunk_size": args.chunk}
    config["run"]["threads"] = 1
    write_config(config, folder / "ppo.yaml")
    loaded = load_config(str(folder / "ppo.yaml"), args.overrides)
    if not platform.HAS_CUDA:
        pin_to(cores[1])  # the server is started from here
    stop = StopRequests(loaded.config.run.stop_within_s)
    with start_run(loaded, stop) as current, open_ppo(loaded.config, current) as trainer:
        if not platform.HAS_CUDA:
            pin_to(cores[0])
        if trainer.turns.needs_first_sync:
            trainer.sync_weights(0)
        bench = Bench(trainer, trainer.data.next_prompts(), trainer.batching.chunk_size)
        found = {}
        for kind in ("fixed", "long_tailed"):
            lengths = draw_lengths(kind, args.prompts, args.longest, seed=5)
            found[kind] = measure_lengths(bench, lengths, args.rounds)
            print(f"{kind}: {json.dumps(found[kind])}", flush=True)
        sync = measure_sync(trainer, args.rounds)
    return {"lengths": found, **sync}


def main() -> None:
    parser = harness.parser(__doc__, rounds=5, num_warm_up=NUM_WARM_UP)
    parser.add_argument("--model", choices=SHAPES, default="2.4m", help="size of every model")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="dtype of every model")
    parser.add_argument("--prompts", type=int, default=256, help="number of prompts of the rollout batch")
    parser.add_argument(
        "--longest", type=int, default=128, help="tokens of the longest response; fixed ones have half of it"
    )
    parser.add_argument(
        "--running-batch", type=int, default=64, help="number of sequences that the generator decodes at once"
    )
    parser.add_argument("--chunk", type=int, help="number of responses of a chunk (default: the running batch)")
    parser.add_argument("--micro-batch", type=int, default=16, help="number of sequences of a forward")
    parser.add_argument("overrides", nargs="*", help="config overrides, such as residency.offload=false")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="make-experience-") as folder, harness.one_rank():
        result = run(args, Path(folder))
    sync = {name: value for name, value in result.items() if name != "lengths"}
    worst = {
        "pipelined_over_ideal": max(r["pipelined_over_ideal"] for r in result["lengths"].values()),
        "pipelined_over_serial": max(r["pipelined_over_serial"] for r in result["lengths"].values()),
        "generation_rate_ratio": min(r["generation_rate_ratio"] for r in result["lengths"].values()),
        "identical_to_serial": all(r["identical_to_serial"] for r in result["lengths"].values()),
        "logprob_peak_ratio": logprob_memory.measure()["logprob_peak_ratio"],
    }
    figures = {"device": platform.device().type, **harness.settings(args), **worst, **result}
    harness.report("make_experience", figures, args.json, text=table(result["lengths"], sync))


if __name__ == "__main__":
    main()

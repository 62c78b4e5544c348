"""Run PPO for long under load, and measure whether memory, file descriptors and threads stay flat and every response arrives.

    python benchmarks/load.py --json load.json
    python benchmarks/load.py --steps 40 --rows 400 --engine megatron

A random model answers 2,000 of 10,000 prompts per step, with a KV cache that holds a part of the running batch, so that vLLM preempts.
All features of a run are on: roles take turns on the device, checkpoints, the bank, rollout dumps, TensorBoard. After every step the
benchmark counts the resident memory, file descriptors and threads of all processes; a patch of vLLM's scheduler counts the preemptions.
The slope is that of a least-squares line through the steps after a warm-up. A growth is the median of the last tenth less that of the
first. A response is lost when the step's dump lacks its row, or has it at another length than requested. FILE is written again after
every step.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
from faults_run import Run
from ppo_step_inputs import ModelShape, Work, our_config, write_config, write_inputs

from hetero_ppo.table import render_table

SHAPE = ModelShape("load", 1, 32, 64, 1, 1, 64)
#: A block of vLLM's KV cache on a CPU has 128 tokens: a response that grows over a block's end needs another one, and
#: with none free a sequence is preempted.
PROMPT_TOKENS, RESPONSE_TOKENS = 124, 8
KV_CACHE_MIB = 1
MAX_NUM_SEQS = 64
SAMPLE_EVERY_S = 0.2
MIB = 2**20
PREEMPTIONS = Path(__file__).resolve().parent / "load_preemptions"


@dataclass(frozen=True)
class Usage:
    """Resources of the processes of a run, by kind of process (``rank``, ``engine``, ...)."""

    step: int
    rss: dict[str, int]  # bytes
    fds: dict[str, int]
    threads: dict[str, int]


def kind_of(pid: int) -> str:
    """Return the kind of a process of a run, from its command line and name."""
    command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    name = Path(f"/proc/{pid}/comm").read_text().strip()
    for text, kind in (
        ("VLLM", "engine"),
        ("launcher", "launcher"),
        ("guardian", "guardian"),
        ("api_server", "server"),
    ):
        if text in name or text in command:
            return kind
    return "rank" if "hetero_ppo.cli.main" in command else "other"


def usage(run: Run, step: int) -> Usage:
    """Count what all living processes of the run hold."""
    rss, fds, threads = Counter[str](), Counter[str](), Counter[str]()
    for pid in run.left():
        try:
            kind = kind_of(pid)
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            num_fds = len(os.listdir(f"/proc/{pid}/fd"))
        except OSError:  # it ended meanwhile
            continue
        rss[kind] += int(status.get("VmRSS", "0 kB").split()[0]) * 1024
        fds[kind] += num_fds
        threads[kind] += int(status["Threads"])
    return Usage(step, dict(rss), dict(fds), dict(threads))


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return the slope of the least-squares line."""
    return statistics.linear_regression(xs, ys).slope


def growth(values: Sequence[int]) -> float:
    """Return the median of the last tenth less that of the first."""
    tenth = max(1, len(values) // 10)
    return statistics.median(values[-tenth:]) - statistics.median(values[:tenth])


def figures_of(samples: Sequence[Usage], warm_up: int) -> dict[str, Any]:
    """Return the slopes and growths of the counts after the warm-up."""
    kept = [sample for sample in samples if sample.step > warm_up]
    steps = [float(sample.step) for sample in kept]
    kinds = sorted({kind for sample in kept for kind in sample.rss})

    def mib_per_100(values: list[int]) -> float:
        return round(100 * slope(steps, [value / MIB for value in values]), 3)

    return {
        "rss_growth_mb_per_100_steps": mib_per_100([sum(sample.rss.values()) for sample in kept]),
        "rss_growth_by_process": {kind: mib_per_100([sample.rss.get(kind, 0) for sample in kept]) for kind in kinds},
        "rss_mb": {kind: round(kept[-1].rss.get(kind, 0) / MIB, 1) for kind in kinds},
        "fd_growth": growth([sum(sample.fds.values()) for sample in kept]),
        "thread_growth": growth([sum(sample.threads.values()) for sample in kept]),
    }


def lost_rows(path: Path, num_rows: int) -> int:
    """Count the rows of a step that its dump lacks, has twice, or has at another length."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    whole = {record["prompt_index"] for record in records if len(record["response_ids"]) == RESPONSE_TOKENS}
    return num_rows - len(whole) + max(0, len(records) - num_rows)


def format_line(figures: dict[str, Any]) -> str:
    """Return the figures of a step on one line."""
    names = ("rss_growth_mb_per_100_steps", "fd_growth", "thread_growth", "rows_lost", "preemptions", "step_s")
    return ", ".join(f"{name} {figures[name]}" for name in names)


class Load:
    """One run in a folder."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.args = args
        self.run_dir = folder / "run"
        self.preemptions = folder / "preemptions"
        self.samples: list[Usage] = []
        self.rows_lost = 0
        work = Work(args.rows, PROMPT_TOKENS, RESPONSE_TOKENS, minibatch=max(1, args.rows // 4))
        inputs = write_inputs(SHAPE, work, steps=args.prompts // args.rows, folder=folder)
        config = our_config(inputs, work, "fp32", args.steps, self.run_dir, micro_batch=min(64, work.minibatch))
        config["run"] |= {"tensorboard": True, "threads": 1}
        config["train"] |= {"dump_rollouts": True}
        config["checkpoint"] |= {"every": max(2, args.steps // 4), "keep": 1}
        config["residency"] = {"offload": True}
        rollout = config["rollout"] | {"max_num_seqs": min(MAX_NUM_SEQS, args.rows)}
        if args.engine == "megatron":
            rollout = {
                "engine": "megatron",
                **{name: rollout[name] for name in ("max_num_seqs", "sampling", "eval_sampling")},
            }
        else:
            rollout |= {"num_servers": 1, "server_threads": 1, "kv_cache_mib": KV_CACHE_MIB}
        config["rollout"] = rollout
        self.config = folder / "ppo.yaml"
        write_config(config, self.config)

    def run(self, log: Path) -> Iterator[dict[str, Any]]:
        """Run to the end, or to the end of the minutes. Yield the figures after every step with enough steps before it."""
        program = ["-m", "hetero_ppo.cli.main", "train", "--config", str(self.config)]
        self.preemptions.touch()
        path = os.pathsep.join([str(PREEMPTIONS), *filter(None, [os.environ.get("PYTHONPATH")])])
        run = Run(program, self.args.ranks, log, PYTHONPATH=path, LOAD_PREEMPTIONS=str(self.preemptions))
        metrics, until = self.run_dir / "metrics.jsonl", run.started + 60 * self.args.minutes
        try:
            while time.monotonic() < until:
                is_over = run.process.poll() is not None
                num_steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
                for step in range(len(self.samples) + 1, num_steps + 1):
                    self._count(run, step)
                    if self._kept() > 2:
                        yield self._figures()
                if is_over and run.process.returncode == 0 and self._kept() > 2:
                    self._count_rows(len(self.samples))
                    yield self._figures()
                if is_over:
                    break
                time.sleep(SAMPLE_EVERY_S)
            if run.process.poll() not in (None, 0):
                raise RuntimeError(f"the run ended with status {run.process.returncode}:\n{log.read_text()[-3000:]}")
        finally:
            for pid in run.left():
                os.kill(pid, signal.SIGKILL)
            run.process.wait()
        if self._kept() <= 2:
            raise RuntimeError(
                f"the run came to {len(self.samples)} steps, too few for a slope after a warm-up of {self.args.warm_up}:\n{log.read_text()[-3000:]}"
            )

    def _kept(self) -> int:
        return len(self.samples) - self.args.warm_up

    def _count(self, run: Run, step: int) -> None:
        self.samples.append(usage(run, step))
        if step > 1:
            self._count_rows(step - 1)  # a step's dump follows its metrics

    def _count_rows(self, step: int) -> None:
        dump = self.run_dir / "rollouts" / f"step_{step:06d}.jsonl"
        self.rows_lost += lost_rows(dump, self.args.rows) if dump.exists() else self.args.rows
        dump.unlink(missing_ok=True)  # 200 of them would fill the disk

    def _figures(self) -> dict[str, Any]:
        records = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]
        return {
            **figures_of(self.samples, self.args.warm_up),
            "rows_lost": self.rows_lost,
            "preemptions": self.preemptions.stat().st_size,
            "steps": len(self.samples),
            "rows": self.args.rows,
            "engine": self.args.engine,
            "step_s": round(statistics.median(record["seconds"]["total"] for record in records), 2),
            **self._cache(),
        }

    def _cache(self) -> dict[str, int]:
        """Return the tokens that vLLM's KV cache holds and those of a full running batch: with fewer than these it must preempt."""
        text = "".join(path.read_text(errors="replace") for path in self.run_dir.rglob("*.log"))
        found = re.search(r"KV cache size: ([\d,]+) tokens", text)
        if found is None:
            return {}
        batch = min(MAX_NUM_SEQS, self.args.rows) * (PROMPT_TOKENS + RESPONSE_TOKENS)
        return {"kv_cache_tokens": int(found[1].replace(",", "")), "batch_tokens": batch}


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument("--steps", type=int, default=200, help="number of PPO steps")
    parser.add_argument("--rows", type=int, default=2000, help="number of responses of a step")
    parser.add_argument("--prompts", type=int, default=10_000, help="number of prompts, a multiple of --rows")
    parser.add_argument("--engine", choices=("vllm", "megatron"), default="vllm", help="generator: rollout.engine")
    parser.add_argument("--ranks", type=int, default=1, help="number of ranks of the run")
    parser.add_argument(
        "--warm-up", type=int, help="number of first steps, in which pools fill, that do not count (default: a tenth)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=600.0,
        help="end the run after so long; the figures are those of the steps until then",
    )
    args = parser.parse_args(arguments)
    if args.warm_up is None:
        args.warm_up = max(3, args.steps // 10)
    if args.prompts % args.rows:
        parser.error(
            f"--prompts {args.prompts} is no multiple of --rows {args.rows}: a step would have prompts of two epochs"
        )
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # nothing stays behind
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="hetero_ppo_load_") as name:
        for figures in Load(Path(name), args).run(Path(name) / "log"):
            print(f"step {figures['steps']:>4} | {format_line(figures)}", file=sys.stderr, flush=True)
            if args.json is not None:
                harness.write_json(args.json, {"benchmark": "load", **figures})
    rows = [[name, str(value)] for name, value in figures.items()]
    harness.report("load", figures, args.json, text=render_table(rows, "lr"))


if __name__ == "__main__":
    main()

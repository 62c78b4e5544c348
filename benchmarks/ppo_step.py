"""Measure the seconds of a PPO step by phase, samples/s and tokens/s; with ``--peer trl`` also those of TRL's PPOTrainer.

The work: 64 prompts of 16 tokens, 64-token responses (the end-of-sequence token does not stop them), one PPO epoch,
minibatches of 16, four random Llama models of one size (2.4m: 4 layers, hidden size 256, vocabulary 128; 30m: 8 layers,
hidden size 512, vocabulary 4096). Each system runs in its own processes and has the machine to itself; the systems alternate
over ``--rounds`` rounds. The first steps of every run are warm-up and do not count. See ``docs/benchmarks.md``.

    python benchmarks/ppo_step.py --model 2.4m --dtype bf16 --peer trl --json result.json
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import harness
from peers.environment import default_folder, ensure_trl, tail
from ppo_step_inputs import ROLES, SHAPES, Inputs, ModelShape, Work, num_cores, our_config, write_config, write_inputs
from ppo_step_report import model_result, read_steps, report, summary, table

ROOT = Path(__file__).resolve().parents[1]
DTYPES = ("fp32", "bf16")
#: Number of steps of a run that count: about 20 seconds of work on two cores.
DEFAULT_STEPS = {"2.4m": 8, "30m": 3}


def run_process(command: list[str], log: Path, timeout_s: float) -> None:
    """Run a command in its own session, with its output in ``log``. No process of it is left, however this function ends.

    Raises:
        RuntimeError: The command failed or ran past ``timeout_s``. The message has the end of the log.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=log.parent, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        try:
            code = process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{' '.join(command)} ran past {timeout_s:.0f} s:\n{tail(log.read_text())}") from error
        finally:
            stop(process)
    if code != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{tail(log.read_text(), 40)}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs: SIGTERM, so that it stops its servers, and SIGKILL for its group after 20 seconds."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_ours(args: argparse.Namespace, inputs: Inputs, work: Work, steps: int, folder: Path) -> list[dict[str, float]]:
    """Run this project once. Return the seconds by phase of the steps that count."""
    folder.mkdir(parents=True)
    micro_batch = args.micro_batch or work.minibatch
    config = our_config(inputs, work, args.dtype, args.warmup + steps, folder / "run", micro_batch)
    write_config(config, folder / "ppo.yaml")
    launcher = [sys.executable, "-m", "hetero_ppo.cli.launcher", "--standalone", f"--nproc-per-node={args.nproc}"]
    command = [*launcher, "-m", "hetero_ppo.cli.main", "train", "--config", str(folder / "ppo.yaml"), *args.overrides]
    run_process(command, folder / "log.txt", args.timeout)
    measured = read_steps(folder / "run" / "metrics.jsonl")
    if len(measured) != args.warmup + steps:
        raise RuntimeError(f"{folder}/run/metrics.jsonl holds {len(measured)} steps, not {args.warmup + steps}")
    return measured[args.warmup :]


def run_trl(
    args: argparse.Namespace, python: Path, inputs: Inputs, work: Work, dtype: str, steps: int, folder: Path
) -> list[dict[str, float]]:
    """Run TRL once. Return the seconds by phase of the steps that count."""
    folder.mkdir(parents=True)
    result = folder / "result.json"
    launcher = [str(python)]
    if args.peer_nproc > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.peer_nproc}"]
    command = [*launcher, str(ROOT / "benchmarks" / "peers" / "trl_ppo.py"), "--json", str(result)]
    for role in ROLES:
        command += [f"--{role}", str(inputs.models[role])]
    numbers = {
        "steps": steps,
        "warmup": args.warmup,
        "threads": max(1, num_cores() // args.peer_nproc),
        "prompts-per-step": work.prompts_per_step,
        "prompt-tokens": work.prompt_tokens,
        "response-tokens": work.response_tokens,
        "minibatch": work.minibatch,
        "micro-batch": work.minibatch // args.peer_nproc,
        "forward-batch": work.prompts_per_step // args.peer_nproc,
    }
    for name, value in numbers.items():
        command += [f"--{name}", str(value)]
    if args.peer_step_every_minibatch:
        command.append("--step-every-minibatch")
    run_process([*command, "--prompts", str(inputs.prompts), "--dtype", dtype], folder / "log.txt", args.timeout)
    return json.loads(result.read_text(encoding="utf-8"))["steps"]


def measure(
    args: argparse.Namespace, shape: ModelShape, work: Work, peer_python: Path | None, folder: Path
) -> dict[str, Any]:
    """Run all rounds of one model size. Return its JSON object."""
    steps = args.steps or DEFAULT_STEPS[shape.name]
    inputs = write_inputs(shape, work, args.warmup + steps, folder)
    peer_dtypes = [] if peer_python is None else sorted(args.peer_dtypes, key=lambda dtype: dtype != args.dtype)

    def progress(number: int, system: str, measured: list[dict[str, float]]) -> None:
        rate = summary([measured], work)["samples_per_s"]
        print(f"{shape.name} round {number + 1}/{args.rounds}: {system} {rate:.2f} samples/s", flush=True)

    def ours(number: int) -> list[dict[str, float]]:
        return run_ours(args, inputs, work, steps, folder / f"ours-{number}")

    def peer(dtype: str, number: int) -> list[dict[str, float]]:
        return run_trl(args, peer_python, inputs, work, dtype, steps, folder / f"{args.peer}-{dtype}-{number}")

    systems = {"ours": ours, **{f"{args.peer} {dtype}": partial(peer, dtype) for dtype in peer_dtypes}}
    runs = harness.alternate(systems, args.rounds, on_result=progress)
    peer_summaries = {dtype: summary(runs[f"{args.peer} {dtype}"], work) for dtype in peer_dtypes}
    return model_result(shape, args.dtype, summary(runs["ours"], work), args.peer, peer_summaries)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument("--model", choices=[*SHAPES, "all"], default="all", help="size of the models")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="dtype of our models (main parameters are fp32)"
    )
    parser.add_argument("--nproc", type=int, default=2, help="number of our ranks, each with a share of the cores")
    parser.add_argument("--peer-nproc", type=int, default=1, help="number of the peer's ranks")
    parser.add_argument("--steps", type=int, help=f"number of PPO steps of a run that count (default {DEFAULT_STEPS})")
    parser.add_argument("--warmup", type=int, default=1, help="number of PPO steps of a run before them")
    parser.add_argument("--rounds", type=int, help="number of runs of each system (default: 1, with a peer 3)")
    parser.add_argument("--micro-batch", type=int, help="number of sequences of our forwards (default: the minibatch)")
    parser.add_argument("--peer", choices=["trl"], help="system to run in turn with ours")
    parser.add_argument(
        "--peer-dtypes",
        nargs="+",
        choices=DTYPES,
        default=DTYPES,
        help="dtypes of the peer; that of ours is always run",
    )
    parser.add_argument("--peer-step-every-minibatch", action="store_true", help="TRL: optimizer step per minibatch")
    parser.add_argument("--peer-venv", type=Path, default=default_folder(), help="where the peer is installed")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that one run may take")
    parser.add_argument("--folder", type=Path, help="keep models, configs and logs here (default: a temporary folder)")
    parser.add_argument("overrides", nargs="*", help="our config overrides, such as actor.micro_batch_size=8")
    args = parser.parse_intermixed_args(arguments)
    args.rounds = args.rounds or (3 if args.peer else 1)
    args.peer_dtypes = sorted({args.dtype, *args.peer_dtypes})
    for option, nproc in (("--nproc", args.nproc), ("--peer-nproc", args.peer_nproc)):
        if Work().minibatch % nproc:
            parser.error(f"{option} {nproc} does not divide the minibatch of {Work().minibatch}")
    return args


def main() -> None:
    args = parse_arguments()
    # As an exception, SIGTERM passes through the clean-up of the running process and of the temporary folder.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    work = Work()
    shapes = list(SHAPES.values()) if args.model == "all" else [SHAPES[args.model]]
    peer_python = ensure_trl(args.peer_venv) if args.peer else None
    with tempfile.TemporaryDirectory(prefix="ppo-step-") as temporary:
        folder = Path(temporary) if args.folder is None else Path(tempfile.mkdtemp(prefix="ppo-step-", dir=args.folder))
        results = [measure(args, shape, work, peer_python, folder / shape.name) for shape in shapes]
    settings = {
        "dtype": args.dtype,
        "nproc": args.nproc,
        "peer_nproc": args.peer_nproc,
        "peer_step_every_minibatch": args.peer_step_every_minibatch,
        "num_cores": num_cores(),
        "rounds": args.rounds,
    }
    whole = report(results, work, settings)
    harness.report("ppo_step", whole, args.json, text="\n\n".join(map(table, results)))


if __name__ == "__main__":
    main()

"""Run the checks of ``checks.py`` one after the other, each in its own process, and write down their results.

A kernel that reads a wrong address spoils its process, and one that hangs never ends. So no check shares a process, and each has
a time limit, after which its whole process group is killed. See ``scripts/gpu_check.sh`` for the arguments.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, UTC
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: Exit status of a check that can't run here; its message says why.
SKIPPED = 3
#: Characters of a failed check's output that are kept.
KEPT_OUTPUT = 2000
PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "vllm", "transformers", "numpy")


@dataclass
class Result:
    """Result of a check; one line of the file."""

    number: int
    name: str
    proves: str
    status: str  # passed, failed, timeout, skipped
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)  # what was measured
    output: str = ""  # the end of it, of a check that did not pass
    when: str = ""
    machine: dict[str, str] = field(default_factory=dict)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check.jsonl"), help="file that results are appended to")
    parser.add_argument("--only", default="", help="numbers of checks, separated by commas; default: all")
    parser.add_argument("--minutes", type=float, default=15.0, help="no check begins after so many minutes")
    parser.add_argument("--cpu", action="store_true", help="rehearse on the CPU the checks that can be rehearsed")
    parser.add_argument(
        "--checks", default="tests.gpu.checks", help="module that holds them; for tests of this program"
    )
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--facts", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def machine() -> dict[str, str]:
    """Return card, driver and versions, without loading torch."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    program = shutil.which("nvidia-smi")
    if program is not None:
        query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False).stdout.splitlines()
        if lines:
            found["card"], _, found["driver"] = (part.strip() for part in lines[0].partition(","))
    return found


def run_child(args: argparse.Namespace) -> int:
    """Run one check in this process."""
    module = importlib.import_module(args.checks)
    check = module.CHECKS[args.child]
    if args.cpu and not check.on_cpu:
        print("needs a GPU")
        return SKIPPED
    try:
        facts = check.run(args.cpu)
    except module.Skip as reason:
        print(reason)
        return SKIPPED
    args.facts.write_text(json.dumps(facts))
    return 0


def run_check(args: argparse.Namespace, number: int, check: Any) -> Result:
    """Run one check in a process group of its own, and end what is left of it."""
    program = [sys.executable, "-W", "ignore", "-m", "tests.gpu.run_checks"]
    command = [*program, "--child", str(number), "--checks", args.checks]
    command += ["--cpu"] if args.cpu else []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+", errors="replace") as output:
        facts = Path(folder) / "facts.json"
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if args.cpu else {})
        child = subprocess.Popen(
            [*command, "--facts", str(facts)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        try:
            status = {0: "passed", SKIPPED: "skipped"}.get(child.wait(check.timeout_s), "failed")
        except subprocess.TimeoutExpired:
            status = "timeout"
        finally:
            _kill_group(child)
        output.seek(0)
        text = output.read()
        measured = json.loads(facts.read_text()) if facts.exists() else {}
    kept = "" if status == "passed" else text[-KEPT_OUTPUT:]
    return Result(number, check.name, check.proves, status, round(time.monotonic() - start, 1), measured, kept)


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # nothing is left of it
    child.wait()


def table(results: Sequence[Result]) -> str:
    """Return a Markdown table, as docs/gpu.md has it."""
    lines = ["| # | check | proves | came of it | s | measured |", "|---|---|---|---|---|---|"]
    for one in results:
        facts = ", ".join(f"{name} {value}" for name, value in one.facts.items())
        lines.append(f"| {one.number} | {one.name} | {one.proves} | {one.status} | {one.seconds:g} | {facts} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.child is not None:
        return run_child(args)
    checks = importlib.import_module(args.checks).CHECKS
    numbers = [int(number) for number in args.only.split(",")] if args.only else list(range(len(checks)))
    where, start, results = machine(), time.monotonic(), list[Result]()
    print(", ".join(f"{name} {version}" for name, version in where.items()), flush=True)
    for number in numbers:
        check = checks[number]
        if time.monotonic() - start > 60 * args.minutes:
            result = Result(
                number, check.name, check.proves, "skipped", 0.0, output=f"--minutes {args.minutes:g} are over"
            )
        else:
            result = run_check(args, number, check)
        result.when, result.machine = datetime.now(UTC).isoformat(timespec="seconds"), where
        with args.out.open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")
        results.append(result)
        print(
            f"{number:2d} {check.name}: {result.status} in {result.seconds:g} s {json.dumps(result.facts)}", flush=True
        )
        if result.status not in ("passed", "skipped"):
            print(result.output, flush=True)
    print(f"\n{table(results)}\n\nresults are in {args.out}")
    return int(any(result.status in ("failed", "timeout") for result in results))


if __name__ == "__main__":
    sys.exit(main())

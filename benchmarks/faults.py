"""Run PPO into faults, and check that it survives: killed, stopped, frozen, asked to stop, with damaged checkpoints or a full disk.

    python benchmarks/faults.py [--only TEXT ...] [--minutes N] [--seed S] [--jobs J] [--json FILE [--go-on]] [--folder FOLDER]

Every run is a tiny PPO. With the actor as generator it repeats to the bit; with vLLM, it is compared with a run that replays its rollouts.
A case runs into its fault. It must end with its status within a bound and leave no process, or survive by itself. The run then resumes
from the newest good checkpoint, and its last checkpoint is compared with that of the run without a fault, byte by byte.
The last line is one JSON object; FILE is written after every case.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import faults_fork
import harness
from faults_cases import STEPS, Case, cases
from faults_run import RUNS, Run
from faults_scenarios import WORK, Faults, Outcome
from faults_stall import measure_stall

from hetero_ppo.table import render_table


def report(outcomes: list[Outcome], stall: dict[str, float]) -> dict[str, Any]:
    """Return the figures of the table."""
    stops = [o.end_s for o in outcomes if o.name in ("SIGTERM", "SIGUSR1", "SIGHUP")]
    resumes = [o.resume_s for o in outcomes if o.resume_s is not None]
    return {
        "survived": sum(o.survived for o in outcomes),
        "total": len(outcomes),
        "cases_there_are": len(cases()),
        "bytes_differing_after_resume": sum(sum(o.differing.values()) for o in outcomes),
        "bytes_compared_up_to_step": STEPS,
        "steps_lost_max": max((o.steps_lost for o in outcomes), default=0),
        "resume_s_median": statistics.median(resumes) if resumes else None,
        "sigterm_exit_s": max(stops) if stops else None,
        "dead_rank_end_s": max((o.end_s for o in outcomes if o.name.startswith("kill rank")), default=None),
        **stall,
    }


class Table:
    """The outcomes until now, in a file that is written after each."""

    def __init__(self, path: Path | None, *, go_on: bool) -> None:
        """Start with no outcome, or with those of an earlier call.

        Args:
            path: File of the outcomes, or None for none.
            go_on: True to keep the cases in the file that survived.
        """
        self.path = path
        self.outcomes: list[Outcome] = []
        self.stall: dict[str, float] = {}
        if go_on and path is not None and path.exists():
            there = json.loads(path.read_text())
            self.outcomes = [Outcome(**row) for row in there["cases"] if row["survived"]]
            self.stall = {name: there[name] for name in there if name.startswith(("save_", "step_s_", "disk_"))}

    def add(self, outcome: Outcome) -> None:
        """Print an outcome and write the file."""
        self.outcomes.append(outcome)
        print(f"{'ok  ' if outcome.survived else 'LOST'} {outcome.name}: {json.dumps(asdict(outcome))}", flush=True)
        self.write()

    def write(self) -> None:
        """Write the figures and all outcomes."""
        if self.path is not None:
            harness.write_json(
                self.path, {"benchmark": "faults", **report(self.outcomes, self.stall), **self.details()}
            )

    def details(self) -> dict[str, Any]:
        """Return all outcomes as JSON values."""
        return {"cases": [asdict(outcome) for outcome in self.outcomes]}


def run_cases(faults: Faults, chosen: list[Case], table: Table, minutes: float | None, jobs: int) -> None:
    """Run cases until they are done, or until the next one would probably end after so many minutes."""
    end = None if minutes is None else time.monotonic() + 60 * minutes
    taken: list[float] = []

    def run(case: Case) -> Outcome | None:
        if end is not None and time.monotonic() + (statistics.mean(taken) if taken else 60.0) > end:
            return None
        start = time.monotonic()
        outcome = faults.run(case)
        taken.append(time.monotonic() - start)
        return outcome

    with ThreadPoolExecutor(jobs) if jobs > 1 else contextlib.nullcontext() as pool:
        for outcome in map(run, chosen) if pool is None else pool.map(run, chosen):
            if outcome is not None:
                table.add(outcome)


def main() -> None:
    """Run the command."""
    is_heard = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    parser = harness.parser(__doc__)
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="cases whose name has one of these in it"
    )
    parser.add_argument("--minutes", type=float, help="a sample of the cases that fits into this time")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the sample, and of the times at which processes are killed"
    )
    parser.add_argument("--jobs", type=int, default=1, help="number of cases that run at a time")
    parser.add_argument("--go-on", action="store_true", help="leave out the cases that survived in FILE, and add to it")
    parser.add_argument(
        "--folder", type=Path, help="run in this folder and keep it; its runs without a fault are used again"
    )
    parser.add_argument(
        "--fork",
        action="store_true",
        help="fork launchers and ranks from a process that has imported everything, which is faster",
    )
    parser.add_argument("--stall", action="store_true", help="measure the stall of a save even without the whole table")
    args = parser.parse_args()
    # Under nohup the runs would ignore it too.
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(128 + signal.SIGHUP) if is_heard else None)
    if args.fork and args.jobs > 1:
        parser.error("--fork runs one case at a time: leave --jobs out")
    table = Table(args.json, go_on=args.go_on)
    done = {outcome.name for outcome in table.outcomes}
    chosen = [case for case in cases() if any(text in case.name for text in args.only)]
    if not chosen:
        parser.error(
            f"no case has one of {args.only} in its name; there are: {', '.join(case.name for case in cases())}"
        )
    is_whole = len(chosen) == len(cases()) and args.minutes is None and not done
    chosen = [case for case in chosen if case.name not in done]
    if args.minutes is not None:
        random.Random(args.seed).shuffle(chosen)
    with tempfile.TemporaryDirectory(prefix="hetero_ppo_faults_") as name:
        folder = Path(name) if args.folder is None else args.folder
        try:
            faults = Faults(folder, args.seed, faults_fork.begin() if args.fork else Run)
            if args.stall or is_whole:
                table.stall = measure_stall(Path(name) / "stall", WORK)
            run_cases(faults, chosen, table, args.minutes, args.jobs)
        finally:  # an interrupted benchmark leaves no process either
            for pid in (pid for run in RUNS for pid in run.left()):
                os.kill(pid, signal.SIGKILL)
    figures = report(table.outcomes, table.stall)
    rows = [[name, str(value)] for name, value in figures.items()]
    harness.report("faults", figures, args.json, text=render_table(rows, "lr"), details=table.details())


if __name__ == "__main__":
    main()

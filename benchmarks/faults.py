"""Faults that a PPO run meets, and what becomes of it: killed, asked to stop, given damaged checkpoints or a full disk.

    python benchmarks/faults.py [--only TEXT ...] [--json FILE]

Every run is a tiny PPO with the actor as rollout engine, so that it repeats to the bit. A case runs into its fault, has to end with its
status within a bound and leave no process, goes on from the newest good checkpoint, and is compared with the run that met no fault:
checkpoint files and metrics, byte by byte. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from faults_cases import HAPPENED, STEPS, Case, cases
from ppo_step_inputs import ModelShape, Work, our_config, write_config, write_inputs

from hetero_ppo.observability.jsonl import whole_lines

ROOT = Path(__file__).resolve().parents[1]
#: Seconds within which a run that met its fault has to be over, start included.
BOUND_S = 120.0
MARK = "HETERO_PPO_FAULTS_MARK"
SHAPE = ModelShape("tiny", 2, 64, 128, 4, 2, 64)
#: Of the checkpoint whose stall is measured: two roles, 0.3 GB together.
STALL_SHAPE = ModelShape("stall", 4, 512, 1536, 8, 4, 64)
STALL_STEPS = 6
WORK = Work(prompts_per_step=8, prompt_tokens=6, response_tokens=8, minibatch=4)


@dataclass
class Outcome:
    """What a case came to."""

    name: str
    survived: bool
    why: str  # it did not survive; "" otherwise
    status: int
    steps_lost: int  # steps that were logged and had to be done again
    bytes_differing: int  # of checkpoint files and metrics after going on
    end_s: float  # to the end of all processes: from the fault or the signal, else from the start
    resume_s: float | None  # from the start of the resumed run to its first step


def write_setup(folder: Path) -> Path:
    """Models, prompts for less than the run's steps (so that an epoch ends within it), and the configuration."""
    inputs = write_inputs(SHAPE, WORK, steps=1, folder=folder)
    config = our_config(inputs, WORK, "fp32", STEPS, folder / "unused", micro_batch=4)
    config["run"] |= {"threads": 1}
    config["actor"]["optimizer"] = {"lr": 1e-3, "lr_schedule": "cosine", "warmup_steps": 2}
    config["critic"]["optimizer"] = {"lr": 1e-3}
    kl = {"controller": "adaptive", "horizon": 100, "target": 0.5, "coef": 0.05}
    config["algorithm"] |= {"old_log_probs": "actor", "kl": kl, "rollout_batch_size": WORK.prompts_per_step - 2, "minibatch_size": 2}
    config["reward"] = {"normalise": True}
    config["rollout"] = {"engine": "megatron", "max_num_seqs": 4, "sampling": config["rollout"]["sampling"]}
    config["residency"] = {"offload": True}
    config["checkpoint"] |= {"every": 1, "keep": 10}
    path = folder / "ppo.yaml"
    write_config(config, path)
    return path


#: Every launch, to be ended with the benchmark.
RUNS: list[Run] = []


class Run:
    """One launch, in a session of its own, and all that it started by the mark in their environment."""

    def __init__(self, program: Sequence[str], num_ranks: int, log: Path, file_limit: int | None = None) -> None:
        self.mark = uuid.uuid4().hex
        self.log = log
        command = [sys.executable, "-m", "hetero_ppo.cli.launcher", "--standalone", "--nproc-per-node", str(num_ranks)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", MARK: self.mark}
        limit = [] if file_limit is None else ["prlimit", f"--fsize={file_limit}"]
        self.started = time.monotonic()
        RUNS.append(self)
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [*limit, *command, *program], cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True
            )

    def ranks(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def left(self) -> list[int]:
        """Processes with the mark that still live."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue  # gone meanwhile, or not ours
        return found

    def wait(self) -> int | None:
        """The exit status; None when it had to be ended."""
        try:
            return self.process.wait(timeout=max(1.0, self.started + BOUND_S - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> bool:
        """Kill what is left; whether nothing was, within 10 s."""
        until = time.monotonic() + 10
        while self.left() and time.monotonic() < until:
            time.sleep(0.1)
        left = self.left()
        self.found_left = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode() for pid in left]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        return not left


def records(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Step -> its record; the later one of a step that was done twice."""
    path = run_dir / "metrics.jsonl"
    lines = whole_lines(path) if path.exists() else []
    return {record["step"]: record for record in map(json.loads, lines)}


def results(run_dir: Path, step: int) -> str:
    """The metrics of a step that are no seconds, bytes or rates."""
    found = records(run_dir)[step]["metrics"]
    return json.dumps({k: v for k, v in found.items() if not k.startswith(("memory/", "pipeline/")) and not k.endswith("_s")})


def differing_bytes(found: bytes, expected: bytes) -> int:
    return sum(a != b for a, b in zip(found, expected, strict=False)) + abs(len(found) - len(expected))


def compare(run_dir: Path, straight: Path, step: int) -> int:
    """Bytes of a step's weights, optimizer and trainer state, and of its metrics, that are not those of the other run."""
    name = f"checkpoints/iter_{step:07d}"
    total = differing_bytes(results(run_dir, step).encode(), results(straight, step).encode())
    for role in ("actor", "critic"):
        for path in sorted((straight / name / role).glob("*.distcp")):
            total += differing_bytes((run_dir / name / role / path.name).read_bytes(), path.read_bytes())
    state, expected = (json.loads((folder / name / "trainer.json").read_text()) for folder in (run_dir, straight))
    for key in ("step", "prompts", "kl_controller", "score_moments"):
        total += differing_bytes(json.dumps(state[key]).encode(), json.dumps(expected[key]).encode())
    return total


class Faults:
    """Runs cases in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = write_setup(folder)
        self.straight: dict[int, Path] = {}

    def program(self, run_dir: Path, *overrides: str, point: dict[str, Any] | None = None) -> list[str]:
        worker = ["-m", "hetero_ppo.cli.main"]
        if point is not None:
            worker = [str(ROOT / "benchmarks" / "faults_worker.py"), json.dumps({"what": "kill", **point})]
        return [*worker, "train", "--config", str(self.config), f"run.dir={run_dir}", *overrides]

    def run_straight(self, num_ranks: int) -> Path:
        """The run without a fault, long enough to compare a stopped run with."""
        if num_ranks not in self.straight:
            run_dir = self.folder / f"straight_{num_ranks}"
            run = Run(self.program(run_dir), num_ranks, self.folder / f"straight_{num_ranks}.log")
            if run.wait() != 0 or not run.end():
                raise RuntimeError(f"the run without a fault failed:\n{run.log.read_text()[-3000:]}")
            self.straight[num_ranks] = run_dir
        return self.straight[num_ranks]

    def run(self, case: Case, number: int) -> Outcome:
        """The fault, the end, going on, the comparison."""
        self.run_straight(case.num_ranks)
        run_dir = self.folder / f"case_{number}"
        outcome = Outcome(case.name, False, "", 0, 0, 0, 0.0, None)
        if case.disk is not None:
            self._disk(case, run_dir, outcome)
        elif case.damage is not None:
            self._damage(case, run_dir, outcome)
        else:
            self._fault(case, run_dir, outcome)
        outcome.survived = not outcome.why and outcome.bytes_differing == 0
        return outcome

    def _finish(self, run: Run, case: Case, outcome: Outcome, expected: int) -> None:
        since = time.monotonic() if case.signals else run.started
        status = run.wait()
        clean = run.end()
        outcome.end_s = time.monotonic() - since
        outcome.status = -1 if status is None else status
        text = run.log.read_text()
        if HAPPENED in text:
            outcome.end_s = time.time() - float(text.partition(HAPPENED)[2].split()[0])
        if status != expected:
            outcome.why = f"status {status}, not {expected}: {text[-300:]!r}"
        elif not clean:
            outcome.why = f"processes were left: {run.found_left}"
        elif case.message not in text:
            outcome.why = f"no {case.message!r} in the output: {text[-300:]!r}"

    def _fault(self, case: Case, run_dir: Path, outcome: Outcome) -> None:
        run = Run(self.program(run_dir, *case.overrides, point=case.point), case.num_ranks, run_dir.with_suffix(".log"))
        if case.signals:
            while not records(run_dir) and run.process.poll() is None:
                time.sleep(0.005)
            os.kill(run.ranks()[0] if case.to_rank else run.process.pid, case.signals[0])
        self._finish(run, case, outcome, case.status)
        if not outcome.why:
            self._go_on(case, run_dir, outcome, *case.resumed)

    def _damage(self, case: Case, run_dir: Path, outcome: Outcome) -> None:
        assert case.damage is not None
        done = Run(self.program(run_dir, "train.steps=3", "actor.optimizer.lr_schedule=constant"), 1, run_dir.with_suffix(".log"))
        done.wait()
        done.end()
        case.damage(run_dir / "checkpoints" / "iter_0000003")
        straight = self.folder / "straight_constant"
        constant = "actor.optimizer.lr_schedule=constant"
        if not straight.exists():
            run = Run(self.program(straight, constant), 1, straight.with_suffix(".log"))
            run.wait()
            run.end()
        if case.status:
            refused = Run(self.program(run_dir, constant, f"checkpoint.load={run_dir}"), 1, run_dir.with_suffix(".log"))
            self._finish(refused, case, outcome, case.status)
            self._go_on(case, run_dir, outcome, constant, "checkpoint.step=2", straight=straight)
        else:
            self._go_on(case, run_dir, outcome, constant, straight=straight)

    def _disk(self, case: Case, run_dir: Path, outcome: Outcome) -> None:
        run_dir.mkdir()
        limit = 200_000 if case.disk == "limit" else None
        options = {"full": "size={}k", "small": "size=300k", "read-only": "ro", "limit": None}[str(case.disk)]
        if options is not None:
            options = options.format(self._one_checkpoint_kib() * 3 // 2)  # room for the first one, and not for the second
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "faults", str(run_dir)], check=True)
        try:
            run = Run(self.program(run_dir), 1, run_dir.with_suffix(".log"), file_limit=limit)
            self._finish(run, case, outcome, case.status)
            if case.disk in ("full", "small"):
                subprocess.run(["mount", "-o", "remount,size=200m", str(run_dir)], check=True)
            if case.disk != "read-only" and not outcome.why:
                self._go_on(case, run_dir, outcome)
        finally:
            if options is not None:
                subprocess.run(["umount", str(run_dir)], check=True)

    def _one_checkpoint_kib(self) -> int:
        folder = self.straight[1] / "checkpoints" / f"iter_{STEPS:07d}"
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) // 1024

    def _go_on(self, case: Case, run_dir: Path, outcome: Outcome, *overrides: str, straight: Path | None = None) -> None:
        done = len(records(run_dir))
        latest = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
        saved = [path for path in (run_dir / "checkpoints").glob("iter_*/COMPLETE") if not path.parent.name.endswith(".tmp")]
        load = [f"checkpoint.load={run_dir}"] if saved and latest.parent.exists() else []
        log = run_dir.with_name(run_dir.name + "_resumed.log")
        since = time.time()

        def new_steps() -> list[int]:
            return [step for step, record in records(run_dir).items() if record["time"] > since]

        run = Run(self.program(run_dir, *load, *overrides), case.num_ranks, log)
        while run.process.poll() is None:
            if new_steps():
                outcome.resume_s = time.monotonic() - run.started
                break
            time.sleep(0.05)
        status = run.wait()
        if not run.end() or status != 0:
            outcome.why = f"going on ended with {status}: {log.read_text()[-300:]!r}"
            return
        if new_steps():  # else only what follows the last step was left to do
            outcome.steps_lost = max(0, done - (new_steps()[0] - 1))
        outcome.bytes_differing = compare(run_dir, straight or self.straight[case.num_ranks], STEPS)


def disk_gb_s(folder: Path, num_bytes: int) -> float:
    """Rate of writing as much in one file, flushed."""
    data = os.urandom(num_bytes)
    start = time.perf_counter()
    with (folder / "rate").open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return num_bytes / (time.perf_counter() - start) / 1e9


def measure_stall(folder: Path) -> dict[str, float]:
    """Seconds that training stands still for one checkpoint of a model of some size, with ``async_save`` and without."""
    folder.mkdir()
    inputs = write_inputs(STALL_SHAPE, WORK, steps=STALL_STEPS, folder=folder)
    figures: dict[str, float] = {}
    for name, is_async in (("save_stall_s", "true"), ("save_stall_sync_s", "false")):
        run_dir = folder / name
        config = our_config(inputs, WORK, "fp32", STALL_STEPS, run_dir, micro_batch=4)
        config["run"] |= {"threads": 1}
        config["rollout"] = {"engine": "megatron", "max_num_seqs": 4, "sampling": config["rollout"]["sampling"]}
        config["residency"] = {"offload": True}
        config["checkpoint"] |= {"every": 2, "keep": 1}
        write_config(config, folder / "ppo.yaml")
        program = ["-m", "hetero_ppo.cli.main", "train", "--config", str(folder / "ppo.yaml"), f"checkpoint.async_save={is_async}"]
        run = Run(program, 1, run_dir.with_suffix(".log"))
        if run.wait() != 0 or not run.end():
            raise RuntimeError(f"the run that measures the stall failed:\n{run.log.read_text()[-3000:]}")
        # A step's record has the seconds of the checkpoint before it, and of the look in the step whether it is written.
        seconds = [record["seconds"].get("checkpoint", 0.0) for record in records(run_dir).values()]
        figures[name] = sum(seconds) / (STALL_STEPS // 2 - 1)  # the last one is in no record
        figures[f"step_s_{name}"] = statistics.mean(record["seconds"]["total"] for record in records(run_dir).values())
        saved = run_dir / "checkpoints" / f"iter_{STALL_STEPS:07d}"
    size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    figures |= {"save_gb": size / 1e9, "save_gb_s": size / figures["save_stall_sync_s"] / 1e9}
    return figures | {"disk_gb_s": disk_gb_s(folder, size)}


def report(outcomes: list[Outcome], stall: dict[str, float]) -> dict[str, Any]:
    """The figures of the table."""
    stops = [o.end_s for o in outcomes if o.name in ("SIGTERM", "SIGUSR1")]
    resumes = [o.resume_s for o in outcomes if o.resume_s is not None]
    return {
        "survived": sum(o.survived for o in outcomes),
        "total": len(outcomes),
        "bytes_differing_after_resume": sum(o.bytes_differing for o in outcomes),
        "steps_lost_max": max((o.steps_lost for o in outcomes), default=0),
        "resume_s_median": statistics.median(resumes) if resumes else None,
        "sigterm_exit_s": max(stops) if stops else None,
        "dead_rank_end_s": max((o.end_s for o in outcomes if o.name.startswith("kill rank")), default=None),
        **stall,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="cases whose name has one of these in it")
    parser.add_argument("--json", type=Path, help="write figures and outcomes here")
    args = parser.parse_args()
    wanted = [case for case in cases() if any(text in case.name for text in args.only)]
    if not wanted:
        parser.error(f"no case has one of {args.only} in its name; there are: {', '.join(case.name for case in cases())}")
    with tempfile.TemporaryDirectory(prefix="hetero_ppo_faults_") as name:
        faults = Faults(Path(name))
        outcomes = []
        try:
            stall = measure_stall(Path(name) / "stall")
            for number, case in enumerate(wanted):
                outcome = faults.run(case, number)
                outcomes.append(outcome)
                print(f"{'ok  ' if outcome.survived else 'LOST'} {case.name}: {json.dumps(asdict(outcome))}", flush=True)
        finally:  # interrupted: nothing stays behind
            for pid in (pid for run in RUNS for pid in run.left()):
                os.kill(pid, signal.SIGKILL)
        figures = report(outcomes, stall)
    if args.json is not None:
        args.json.write_text(json.dumps({**figures, "cases": [asdict(outcome) for outcome in outcomes]}, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

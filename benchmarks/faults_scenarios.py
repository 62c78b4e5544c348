"""Scenarios of the fault benchmark: how each kind of fault is caused, and how the run is resumed and compared."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults_cases import HAPPENED, STEPS, Blow, Case
from faults_compare import compare, records
from faults_reward import FLAG
from faults_run import ROOT, Run
from ppo_step_inputs import ModelShape, Work, our_config, write_config, write_inputs

SHAPE = ModelShape("tiny", 2, 64, 128, 4, 2, 64)
#: vLLM's attention on a CPU wants heads of 32 or more.
VLLM_SHAPE = ModelShape("tiny", 2, 64, 128, 2, 1, 64)
WORK = Work(prompts_per_step=8, prompt_tokens=6, response_tokens=8, minibatch=4)
#: Runs with servers have longer responses, so that a fault in a rollout finds some of them partial.
VLLM_WORK = Work(prompts_per_step=8, prompt_tokens=6, response_tokens=40, minibatch=4)
#: Seconds within which a run with servers must end: a server's start and restart take long.
VLLM_BOUND_S = 300.0


@dataclass
class Outcome:
    """Result of a case."""

    name: str
    survived: bool = False
    why: str = ""  # reason why it did not survive
    status: int = 0
    steps_lost: int = 0  # number of logged steps that the resumed run repeated
    differing: dict[str, int] = field(default_factory=dict)  # part of the last checkpoint -> bytes
    end_s: float = 0.0  # seconds from the fault or the signal (else the start) to the end of all processes
    resume_s: float | None = None  # seconds from the start of the resumed run to its first step
    seconds: float = 0.0  # seconds of the whole case


def write_setup(folder: Path, engine: str) -> Path:
    """Write models, prompts and the configuration, whose path is returned. The prompts last for fewer steps than the run has, so that
    an epoch ends within it.
    """
    work = WORK if engine == "megatron" else VLLM_WORK
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ppo.yaml"
    if path.exists():
        return path
    inputs = write_inputs(SHAPE if engine == "megatron" else VLLM_SHAPE, work, steps=1, folder=folder)
    config = our_config(inputs, work, "fp32", STEPS, folder / "unused", micro_batch=4)
    config["run"] |= {"threads": 1}
    config["actor"]["optimizer"] = {"lr": 1e-3, "lr_schedule": "cosine", "warmup_steps": 2}
    config["critic"]["optimizer"] = {"lr": 1e-3}
    kl = {"controller": "adaptive", "horizon": 100, "target": 0.5, "coef": 0.05}
    config["algorithm"] |= {
        "old_log_probs": "actor",
        "kl": kl,
        "rollout_batch_size": work.prompts_per_step - 2,
        "minibatch_size": 2,
    }
    config["reward"] = {"normalise": True}
    sampling = config["rollout"]["sampling"]
    config["train"] |= {"dump_rollouts": True}
    if engine == "megatron":
        config["rollout"] = {"engine": "megatron", "max_num_seqs": 4, "sampling": sampling}
    else:
        servers = {"num_servers": 1, "max_num_seqs": 4, "kv_cache_mib": 16, "server_threads": 1}
        deadlines = {"hang_timeout_s": 8.0, "sync_timeout_s": 20.0, "request_timeout_s": 60.0}
        config["rollout"] = {**servers, **deadlines, "sampling": sampling}
    config["residency"] = {"offload": True}
    config["checkpoint"] |= {"every": 1, "keep": 10}
    write_config(config, path)
    return path


@dataclass
class Straight:
    """A run without a fault."""

    dir: Path
    seconds: float  # seconds from its start to its end
    phases: dict[str, float]  # seconds of each phase of its second step


class Faults:
    """Runner of cases in one folder. Several may run at a time."""

    def __init__(self, folder: Path, seed: int, launch: type[Run] = Run) -> None:
        """Make models and configurations.

        Args:
            folder: Folder of all runs.
            seed: Seed of the times at which faults happen.
            launch: Class that launches a program.
        """
        self.folder = folder
        self.seed = seed
        self.launch = launch
        self.configs = {engine: write_setup(folder / engine, engine) for engine in ("megatron", "vllm")}
        self._straight: dict[str, Straight] = {}
        self._lock = threading.Lock()

    def program(self, case: Case, run_dir: Path, *overrides: str, point: dict[str, Any] | None = None) -> list[str]:
        """Return the program that the launcher starts."""
        worker = ["-m", "hetero_ppo.cli.main"]
        if point is not None:
            worker = [str(ROOT / "benchmarks" / "faults_worker.py"), json.dumps(point)]
        config = ["--config", str(self.configs[case.engine])]
        return [*worker, "train", *config, f"run.dir={run_dir}", *case.setup, *overrides]

    def start(self, case: Case, run_dir: Path, *overrides: str, log: str = "", **options: Any) -> Run:
        """Start a run of a case. ``log`` is added to the name of its log."""
        point = options.pop("point", None)
        if case.engine == "vllm":
            options["bound_s"] = VLLM_BOUND_S
        path = run_dir.with_name(f"{run_dir.name}{log}.log")
        by_itself = options.get("start") or options.get("file_limit")  # another program starts the launcher
        launch = Run if by_itself else self.launch
        return launch(self.program(case, run_dir, *overrides, point=point), case.num_ranks, path, **options)

    def straight(self, case: Case) -> Straight:
        """Return the run without a fault, which other runs are compared with. The first call runs it."""
        name = f"straight_{case.engine}_{case.num_ranks}" + (
            "" if not case.setup else f"_{case.setup[0].replace('=', '_')}"
        )
        with self._lock:
            if name not in self._straight:
                run_dir, there = self.folder / name, self.folder / f"{name}.json"
                if not there.exists():
                    shutil.rmtree(run_dir, ignore_errors=True)
                    run = self.start(case, run_dir)
                    if run.wait() != 0 or not run.end():
                        raise RuntimeError(f"the run without a fault failed:\n{run.log.read_text()[-3000:]}")
                    there.write_text(
                        json.dumps(
                            {"seconds": time.monotonic() - run.started, "phases": records(run_dir)[2]["seconds"]}
                        )
                    )
                self._straight[name] = Straight(run_dir, **json.loads(there.read_text()))
            return self._straight[name]

    def run(self, case: Case) -> Outcome:
        """Run a case: the fault, the end, the resumed run, and the comparison."""
        try:
            straight = self.straight(case)
        except RuntimeError as error:
            return Outcome(case.name, why=str(error))
        start = time.monotonic()
        run_dir = self.folder / "".join(letter if letter.isalnum() else "_" for letter in case.name)
        shutil.rmtree(run_dir, ignore_errors=True)
        outcome = Outcome(case.name)
        scenario = {
            "point": self._point, "flag": self._flag, "blows": self._blows, "damage": self._damage, "disk": self._disk,
            "folder": self._used if case.folder == "used" else self._two,
        }[case.kind]  # fmt: skip
        scenario(case, run_dir, outcome)
        if not outcome.why:
            self._compare(case, run_dir, outcome, straight)
        outcome.survived = not outcome.why and not outcome.differing
        outcome.seconds = time.monotonic() - start
        return outcome

    # --- faults -----------------------------------------------------------------------------------------------------

    def _point(self, case: Case, run_dir: Path, outcome: Outcome) -> None:
        point = dict(case.point or {})
        if case.inside:
            point["after_s"] = self._random(case).uniform(0.1, 0.9) * self.straight(case).phases[case.inside]
        run = self.start(case, run_dir, *case.overrides, point=point)
        self._finish(run, case, outcome)
        self._go_on(case, run_dir, outcome)

    def _flag(self, case: Case, run_dir: Path, outcome: Outcome) -> None:
        flag = run_dir.with_suffix(".flag")
        flag.touch()
        run = self.start(case, run_dir, *case.overrides, **{FLAG: str(flag)})
        self._finish(run, case, outcome)
        if flag.exists():
            outcome.why = outcome.why or "the function was not called"
        self._go_on(case, run_dir, outcome)

    def _blows(self, case: Case, run_dir: Path, outcome: Outcome) -> None:
        run = self.start(case, run_dir, *case.overrides, start=case.start)
        for blow in case.blows:
            self._wait_for(blow, case, run, run_dir)
            if case.start == "terminal":
                run.close_terminal()
            else:
                run.strike(blow.number, blow.to)
        self._finish(run, case, outcome, since=time.monotonic())
        self._go_on(case, run_dir, outcome)

    def _wait_for(self, blow: Blow, case: Case, run: Run, run_dir: Path) -> None:
        if blow.at_random:
            at = run.started + self._random(case).uniform(0.1, 1.0) * self.straight(case).seconds
            time.sleep(max(0.0, at - time.monotonic()))
            return
        while blow is case.blows[0] and not records(run_dir) and run.process.poll() is None:
            time.sleep(0.005)
        time.sleep(blow.after_s)

    def _damage(self, case: Case, run_dir: Path, outcome: Outcome) -> None:
        assert case.damage is not None
        self._part(case, run_dir)
        case.damage(run_dir / "checkpoints" / "iter_0000003")
        if case.status:
            self._finish(self.start(case, run_dir, f"checkpoint.load={run_dir}"), case, outcome)
        self._go_on(case, run_dir, outcome, *(["checkpoint.step=2"] if case.status else []))

    def _part(self, case: Case, run_dir: Path) -> None:
        """Run the first three steps. The learning rate is constant, so that they are those of a longer run."""
        done = self.start(case, run_dir, "train.steps=3")
        done.wait()
        done.end()

    def _disk(self, case: Case, run_dir: Path, outcome: Outcome) -> None:
        run_dir.mkdir()
        limit = 200_000 if case.disk == "limit" else None
        kib = self._one_checkpoint_kib(case) * 3 // 2  # enough for the first checkpoint, too small for the second
        options = {"full": f"size={kib}k", "small": "size=300k", "read-only": "ro", "limit": None}[str(case.disk)]
        if options is not None:
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "faults", str(run_dir)], check=True)
        try:
            self._finish(self.start(case, run_dir, file_limit=limit), case, outcome)
            if case.disk in ("full", "small"):
                subprocess.run(["mount", "-o", "remount,size=200m", str(run_dir)], check=True)
            if case.disk != "read-only":
                self._go_on(case, run_dir, outcome)
                if not outcome.why:  # before the disk is unmounted
                    self._compare(case, run_dir, outcome, self.straight(case))
        finally:
            if options is not None:
                subprocess.run(["umount", str(run_dir)], check=True)

    def _used(self, case: Case, run_dir: Path, outcome: Outcome) -> None:
        self._part(case, run_dir)
        before = sorted(str(path) for path in run_dir.rglob("*"))
        self._finish(self.start(case, run_dir, "train.steps=3"), case, outcome)
        if not outcome.why and sorted(str(path) for path in run_dir.rglob("*")) != before:
            outcome.why = "the run that was refused has changed the folder"
        self._go_on(case, run_dir, outcome)

    def _two(self, case: Case, run_dir: Path, outcome: Outcome) -> None:
        """Start a second run in the folder of a first one. The second one is refused, and the first one is not disturbed."""
        first = self.start(case, run_dir, "train.steps=4")
        while not (run_dir / "config.yaml").exists() and first.process.poll() is None:
            time.sleep(0.05)
        first.strike(19, "all")  # stopped until the second one has ended, so that both are there at once
        second = self.start(case, run_dir, "train.steps=4", log="_second")
        self._finish(second, case, outcome)
        first.strike(18, "all")
        status = first.wait()
        if not first.end() or status != 0:
            outcome.why = outcome.why or f"the first run ended with {status}: {first.log.read_text()[-300:]!r}"

    def _one_checkpoint_kib(self, case: Case) -> int:
        folder = self.straight(case).dir / "checkpoints" / f"iter_{STEPS:07d}"
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) // 1024

    # --- ends and what follows --------------------------------------------------------------------------------------

    def _random(self, case: Case) -> random.Random:
        return random.Random(f"{self.seed} {case.name}")

    def _finish(self, run: Run, case: Case, outcome: Outcome, since: float | None = None) -> None:
        """Wait for the end of a run, and check its status, its message and that it leaves no process."""
        status = run.wait()
        clean = run.end()
        outcome.end_s = time.monotonic() - (run.started if since is None else since)
        outcome.status = -1 if status is None else status
        text = run.log.read_text()
        if HAPPENED in text:
            outcome.end_s = time.time() - float(text.partition(HAPPENED)[2].split()[0])
        elif case.kind == "point":
            outcome.why = f"the fault did not happen; status {status}: {text[-300:]!r}"
            return
        is_late = any(blow.at_random for blow in case.blows) and status == 0  # the run ended before its fault
        if status != case.status and not is_late:
            outcome.why = f"status {status}, not {case.status}: {text[-600:]!r}"
        elif not clean:
            outcome.why = f"processes were left: {run.found_left}"
        elif case.message not in text:
            outcome.why = f"no {case.message!r} in the output: {text[-600:]!r}"

    def _go_on(self, case: Case, run_dir: Path, outcome: Outcome, *overrides: str) -> None:
        """Resume from the newest checkpoint. A run that survived has nothing to resume."""
        if outcome.why or (outcome.status == 0 and case.kind != "damage"):
            return
        done = len(records(run_dir))
        saved = [
            path for path in (run_dir / "checkpoints").glob("iter_*/COMPLETE") if not path.parent.name.endswith(".tmp")
        ]
        begin = [f"checkpoint.load={run_dir}"] if saved else ["run.overwrite=true"]
        since = time.time()

        def new_steps() -> list[int]:
            return [step for step, record in records(run_dir).items() if record["time"] > since]

        run = self.start(case, run_dir, *begin, *overrides, *case.resumed, log="_resumed")
        while run.process.poll() is None:
            if new_steps():
                outcome.resume_s = time.monotonic() - run.started
                break
            time.sleep(0.05)
        status = run.wait()
        if not run.end() or status != 0:
            outcome.why = f"going on ended with {status}: {run.log.read_text()[-600:]!r}"
        elif new_steps():  # otherwise only the work after the last step was left
            outcome.steps_lost = max(0, done - (new_steps()[0] - 1))

    def _compare(self, case: Case, run_dir: Path, outcome: Outcome, straight: Straight) -> None:
        if case.disk == "read-only" or (case.disk is not None and not (run_dir / "checkpoints").exists()):
            return  # no step was run; or the comparison was made before the disk was unmounted
        if case.engine == "megatron":
            outcome.differing = compare(run_dir, straight.dir, STEPS)
            return
        replay = run_dir.with_name(f"{run_dir.name}_replay")
        shutil.rmtree(replay, ignore_errors=True)
        run = self.start(case, replay, f"train.replay_rollouts={run_dir / 'rollouts'}")
        status = run.wait()
        if not run.end() or status != 0:
            outcome.why = f"the run that replays its rollouts ended with {status}: {run.log.read_text()[-600:]!r}"
            return
        outcome.differing = compare(run_dir, replay, STEPS, replayed=True)

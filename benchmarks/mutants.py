"""Prove that the tests notice a fault: apply one edit at a time and require that the named test fails.

    python benchmarks/mutants.py [--only PATTERN ...] [--fast] [--jobs N] [--json FILE]
    python benchmarks/mutants.py --check

The edits are in ``mutants.toml``, which says how to add one. A mutant *survives* when its test passes although the code is wrong.
The unmutated tree comes first: each named test has to pass there. An edit whose old text is gone, or is there twice, is an error.

Everything runs on a copy of the tree. One process imports torch, transformers and Megatron-Core, and forks a child for each mutant,
so that a mutant costs what its test costs. The last line is one JSON object; the exit status is 0 when no mutant survived, 1 when
one did, and 2 on an error.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import harness
import pytest

ROOT = Path(__file__).resolve().parents[1]
MUTANTS = Path(__file__).with_suffix(".toml")
#: What the child processes find imported already. ``megatron_bridge.platform`` adapts Megatron-Core, so it cannot be mutated here.
WARM = (
    "torch",
    "omegaconf",
    "numpy",
    "safetensors.torch",
    "aiohttp",
    "pyarrow.json",
    "torch.nn.attention.bias",
    "torch.distributed.tensor",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen3.modeling_qwen3",
    "megatron_bridge.platform",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.optimizer",
    "megatron.core.distributed",
)
NOT_MUTATED = "megatron_bridge/platform/"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
}
#: A test that takes longer than on the unmutated tree by this factor (and this many seconds at least) has noticed the mutant.
TIMEOUT_FACTOR, TIMEOUT_S = 10.0, 120.0


@dataclass(frozen=True)
class Mutant:
    """One edit, and the test that has to fail for it."""

    name: str
    area: str  # "algorithm", "reward", "kl", "optimizer", "data", ...: what --only may name as well
    file: str  # relative to the repository's root
    old: str  # is there exactly once
    new: str
    test: str  # pytest's node id: a file, or file::function
    fast: bool = False  # one of those that run with the suite
    options: tuple[str, ...] = ()  # options that the edit takes away, as "Class.field" of hetero_ppo/config/schema/


@dataclass
class Result:
    """Outcome of a mutant."""

    name: str
    outcome: str  # "killed", "survived" or "error"
    seconds: float
    why: str  # the test that failed, or what went wrong


class Outcome:
    """A pytest plugin that notes what failed."""

    def __init__(self) -> None:
        self.failed: str | None = None
        self.broken: str | None = None  # a test file could not be imported
        self.seconds: dict[str, float] = {}  # node id without parameters -> seconds

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note an error of the collection."""
        if report.failed:
            self.broken = f"{report.nodeid}: {str(report.longrepr).strip().splitlines()[-1]}"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the first failure, and the time."""
        name = report.nodeid.split("[")[0]
        self.seconds[name] = self.seconds.get(name, 0.0) + report.duration
        if report.failed and self.failed is None:
            self.failed = report.nodeid


def read_mutants(path: Path = MUTANTS) -> list[Mutant]:
    """Read the list.

    Raises:
        ValueError: A field is missing or unknown, or a name comes twice.
    """
    mutants: list[Mutant] = []
    for table in tomllib.loads(path.read_text())["mutant"]:
        unknown = table.keys() - {field.name for field in fields(Mutant)}
        missing = {"name", "area", "file", "old", "new", "test"} - table.keys()
        if unknown or missing:
            raise ValueError(
                f"{path.name}: {table.get('name', table)}: unknown fields {sorted(unknown)}, missing {sorted(missing)}"
            )
        mutants.append(Mutant(**{**table, "options": tuple(table.get("options", ()))}))
    names = [mutant.name for mutant in mutants]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path.name}: these names come twice: {', '.join(twice)}")
    return mutants


def read_exempt_options(path: Path = MUTANTS) -> dict[str, str]:
    """Read the options that have no mutant, as "Class.field", and why no test on a CPU can notice their loss."""
    return tomllib.loads(path.read_text()).get("without_mutant", {})


def mutated(mutant: Mutant, root: Path) -> str:
    """Return the edited file.

    Raises:
        ValueError: The file does not hold the old text exactly once, the new file does not compile, or the test does not exist.
    """
    path = root / mutant.file
    if mutant.file.startswith(NOT_MUTATED) or not path.is_file():
        raise ValueError(f"{mutant.name}: {mutant.file} is no file that can be mutated")
    source = path.read_text()
    count = source.count(mutant.old)
    if count != 1 or mutant.old == mutant.new:
        raise ValueError(f"{mutant.name}: {mutant.file} has the old text {count} times, not once:\n{mutant.old}")
    file, _, test = mutant.test.partition("::")
    if not (root / file).is_file() or (
        test and f"def {test.split('[')[0].split('::')[-1]}(" not in (root / file).read_text()
    ):
        raise ValueError(f"{mutant.name}: there is no test {mutant.test}")
    edited = source.replace(mutant.old, mutant.new)
    try:
        compile(edited, mutant.file, "exec")
    except SyntaxError as error:
        raise ValueError(f"{mutant.name}: the edit is no Python: {error}") from error
    return edited


def check(mutants: Iterable[Mutant], root: Path = ROOT) -> list[str]:
    """Return what is wrong with the list, one text for each mutant that cannot be applied."""
    errors = []
    for mutant in mutants:
        try:
            mutated(mutant, root)
        except ValueError as error:
            errors.append(str(error))
    return errors


def copy_tree(root: Path, into: Path) -> None:
    """Copy what the tests read, without hidden files and outputs. Compiled files go along: they spare every child the compiling."""

    def ignored(folder: str, names: list[str]) -> set[str]:
        outputs = {"runs", "build", "dist"} if Path(folder) == root else set()
        return {n for n in names if n.startswith(".") or n.endswith(".egg-info") or n in outputs}

    shutil.copytree(root, into, ignore=ignored)


def mutated_tree(base: Path, mutant: Mutant, into: Path) -> None:
    """Make a tree of hard links to ``base``, compiled files included, but for the mutant's file."""
    shutil.copytree(base, into, copy_function=os.link)
    path = into / mutant.file
    edited = mutated(mutant, base)
    for stale in [path, *(path.parent / "__pycache__").glob(f"{path.stem}.*")]:
        stale.unlink()
    path.write_text(edited)


class Pool:
    """Child processes of this one, each with a tree and a test; at most ``jobs`` at a time."""

    def __init__(self, base: Path, jobs: int) -> None:
        self.base = base
        self.jobs = jobs
        self.running: dict[int, tuple[Any, float, float]] = {}  # pid -> (key, start, time limit)

    def start(self, key: Any, tree: Path, tests: Sequence[str], timeout_s: float, *, stop_at_first: bool) -> None:
        """Start a child that runs the tests in ``tree``, and leaves ``<tree>.json`` and ``<tree>.log``."""
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            code = 3
            try:
                code = _run_tests(self.base, tree, tests, stop_at_first)
            finally:  # whatever happens, a child never goes on as the parent
                os._exit(code)
        self.running[pid] = (key, time.monotonic(), timeout_s)

    def wait(self) -> tuple[Any, float, bool]:
        """Wait for a child to end, and end what it started. Return its key, its seconds, and whether it ran out of time."""
        while True:
            for pid, (key, start, timeout_s) in list(self.running.items()):
                seconds = time.monotonic() - start
                is_late = seconds > timeout_s
                if is_late:
                    _kill_group(pid)
                ended, _ = os.waitpid(pid, 0 if is_late else os.WNOHANG)
                if ended:
                    _kill_group(pid)
                    del self.running[pid]
                    return key, seconds, is_late
            time.sleep(0.02)

    @property
    def is_full(self) -> bool:
        """True when no other child may start."""
        return len(self.running) >= self.jobs

    def kill(self) -> None:
        """End all children."""
        for pid in self.running:
            _kill_group(pid)


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _run_tests(base: Path, tree: Path, tests: Sequence[str], stop_at_first: bool) -> int:
    """Turn this process into one of ``tree``, and run pytest in it."""
    os.setsid()
    log = os.open(tree.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)  # of processes that a test starts
    sys.path[:] = [str(tree), *(entry for entry in sys.path if Path(entry) not in (base, ROOT, ROOT / "benchmarks"))]
    for name, module in sys.modules.items():
        if name.split(".")[0] == "megatron_bridge" and hasattr(module, "__path__"):
            module.__path__ = [str(tree / Path(folder).relative_to(base)) for folder in module.__path__]
    outcome = Outcome()
    options = [
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--rootdir",
        str(tree),
        "--basetemp",
        f"{tree}.tmp",
        "--tb=short",
    ]
    code = pytest.main([*options, *(["-x"] if stop_at_first else []), *tests], plugins=[outcome])
    package = sys.modules.get("hetero_ppo")
    if package is not None and Path(str(package.__file__)).parents[1] != tree:
        outcome.broken = f"hetero_ppo came from {package.__file__}"
    elif code not in (0, 1) or not outcome.seconds:
        outcome.broken = outcome.broken or f"pytest ended with {code!r}"
    tree.with_suffix(".json").write_text(json.dumps(vars(outcome)))
    sys.stdout.flush()
    return 0


def read_outcome(tree: Path) -> dict[str, Any]:
    """Read what a child left; where it left nothing, it died in its test."""
    path = tree.with_suffix(".json")
    return (
        json.loads(path.read_text()) if path.exists() else {"failed": "the process died", "broken": None, "seconds": {}}
    )


def run_baseline(pool: Pool, tests: Sequence[str]) -> dict[str, float]:
    """Run all tests on the unmutated tree, those of a file in one process. Returns test -> seconds.

    Raises:
        ValueError: A test fails there.
    """
    by_file: dict[str, list[str]] = {}
    for test in tests:
        by_file.setdefault(test.split("::")[0], []).append(test)
    seconds: dict[str, float] = {}
    failures: list[str] = []
    waiting = sorted(by_file)
    while waiting or pool.running:
        while waiting and not pool.is_full:
            file = waiting.pop()
            tree = pool.base.with_name(f"unmutated-{len(waiting)}")
            shutil.copytree(pool.base, tree, copy_function=os.link)
            pool.start((file, tree), tree, by_file[file], 600.0, stop_at_first=False)
        (file, tree), spent, is_late = pool.wait()
        outcome = read_outcome(tree)
        wrong = "takes over 600 s" if is_late else outcome["failed"] or outcome["broken"]
        if wrong:
            failures.append(f"{file}: {wrong}\n{tree.with_suffix('.log').read_text()[-3000:]}")
        for test in by_file[file]:
            name = test.split("[")[0]
            seconds[test] = sum(
                s for node, s in outcome["seconds"].items() if node == name or node.startswith(f"{name}::")
            )
        _keep_compiled(tree, pool.base)
        shutil.rmtree(tree)
        print(f"unmutated: {file} {'FAILS' if wrong else 'passes'}, {spent:.1f} s", flush=True)
    if failures:
        raise ValueError("tests fail on the unmutated tree:\n" + "\n".join(failures))
    return seconds


def _keep_compiled(tree: Path, base: Path) -> None:
    """Give the base the compiled files that a run of its unmutated copy has made, for the mutants' trees."""
    for path in tree.rglob("__pycache__/*.pyc"):
        target = base / path.relative_to(tree)
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            os.link(path, target)


def run_mutants(pool: Pool, mutants: Sequence[Mutant], seconds: dict[str, float]) -> list[Result]:
    """Run every mutant's test, the longest first."""
    waiting = sorted(mutants, key=lambda mutant: seconds.get(mutant.test, 0.0))
    results: list[Result] = []
    while waiting or pool.running:
        while waiting and not pool.is_full:
            mutant = waiting.pop()
            tree = pool.base.with_name(f"mutant-{len(waiting)}")
            mutated_tree(pool.base, mutant, tree)
            limit = max(TIMEOUT_S, TIMEOUT_FACTOR * seconds.get(mutant.test, 0.0))
            pool.start((mutant, tree), tree, [mutant.test], limit, stop_at_first=True)
        (mutant, tree), spent, is_late = pool.wait()
        results.append(result_of(mutant, read_outcome(tree), spent, is_late))
        result = results[-1]
        print(
            f"{len(results):3}/{len(mutants)} {result.outcome:8} {result.seconds:5.1f} s  {mutant.name}: {result.why}",
            flush=True,
        )
        if result.outcome == "error":
            print(tree.with_suffix(".log").read_text()[-3000:], flush=True)
        for left in (tree, Path(f"{tree}.tmp")):
            shutil.rmtree(left, ignore_errors=True)
    return results


def result_of(mutant: Mutant, outcome: dict[str, Any], seconds: float, is_late: bool) -> Result:
    """Return the result of a mutant. One that cannot be imported proves nothing: that is an error."""
    if is_late:
        return Result(mutant.name, "killed", seconds, f"{mutant.test} did not end")
    if outcome["broken"]:
        return Result(mutant.name, "error", seconds, outcome["broken"])
    if outcome["failed"]:
        return Result(mutant.name, "killed", seconds, outcome["failed"])
    return Result(mutant.name, "survived", seconds, f"{mutant.test} passes")


def warm_up(base: Path) -> None:
    """Import what is not mutated."""
    os.environ.update(ENVIRONMENT)
    sys.path.insert(0, str(base))
    for name in WARM:
        importlib.import_module(name)
    loaded = sorted(name for name in sys.modules if name.split(".")[0] == "hetero_ppo")
    assert not loaded, f"{loaded} would not be mutated"


def run(mutants: Sequence[Mutant], jobs: int, *, baseline: bool) -> list[Result]:
    """Run mutants on a copy of the tree.

    Args:
        mutants: Mutants to run.
        jobs: Number of tests that run at a time.
        baseline: True to prove first that the tests pass on the unmutated tree.

    Raises:
        ValueError: A test fails on the unmutated tree.
    """
    with tempfile.TemporaryDirectory(prefix="mutants_") as folder:
        base = Path(folder).resolve() / "base"
        copy_tree(ROOT, base)
        warm_up(base)
        pool = Pool(base, jobs)
        try:
            seconds = run_baseline(pool, sorted({mutant.test for mutant in mutants})) if baseline else {}
            return run_mutants(pool, mutants, seconds)
        finally:
            pool.kill()


def chosen(mutants: Sequence[Mutant], patterns: Sequence[str], *, fast: bool) -> list[Mutant]:
    """Return the mutants whose name or area has one of the patterns in it; "*" and "?" stand for any text and character."""

    def matches(mutant: Mutant) -> bool:
        return any(fnmatch.fnmatch(text, f"*{pattern}*") for pattern in patterns for text in (mutant.name, mutant.area))

    return [mutant for mutant in mutants if matches(mutant) and (mutant.fast or not fast)]


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="mutants with this in their name or area"
    )
    parser.add_argument("--fast", action="store_true", help="the mutants that run with the suite")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="tests at a time (default: the cores)"
    )
    parser.add_argument("--check", action="store_true", help="only check that every edit applies")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests on the unmutated tree first")
    args = parser.parse_args()
    mutants = chosen(read_mutants(), args.only, fast=args.fast)
    errors = check(mutants)
    if errors or not mutants:
        print("\n".join(errors) or f"error: no mutant has one of {args.only} in its name or area", file=sys.stderr)
        return 2
    if args.check:
        print(f"{len(mutants)} edits apply")
        return 0
    start = time.monotonic()
    try:
        results = run(mutants, max(1, args.jobs), baseline=not args.no_baseline)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    by_outcome = {outcome: [r for r in results if r.outcome == outcome] for outcome in ("survived", "killed", "error")}
    for result in by_outcome["survived"] + by_outcome["error"]:
        print(f"{result.outcome.upper()}: {result.name}: {result.why}")
    figures = {"survived": len(by_outcome["survived"]), "total": len(results), "errors": len(by_outcome["error"])}
    figures["seconds"] = round(time.monotonic() - start)
    text = f"survived: {figures['survived']} of {figures['total']}"
    details = {"mutants": [asdict(result) for result in results]}
    harness.report("mutants", figures, args.json, text=text, details=details)
    return 2 if by_outcome["error"] else 1 if by_outcome["survived"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""Worker processes of reward functions: what a call may do, what ends it, and what it leaves behind."""

from __future__ import annotations

import datetime
import decimal
import fractions
import importlib
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from tests.helpers.one_rank import ONE_RANK
import torch
from tests.unit.test_reward_function import rollout_of

from hetero_ppo.config.schema import RewardErrors
from hetero_ppo.errors import RunError
from hetero_ppo.reward import function, function_pool
from hetero_ppo.reward.function import FunctionReward
from hetero_ppo.reward.function_worker import as_score, frame, parse

FUNCTIONS = """
import asyncio, ctypes, multiprocessing, os, re, signal, sqlite3, subprocess, sys, threading, time

connection = sqlite3.connect(":memory:")
num_calls = 0


class Odd(Exception):
    def __init__(self, one, two):
        super().__init__(one)


def score(prompt, response, label, metadata):
    global num_calls
    num_calls += 1
    return DEEDS[label](metadata) if label in DEEDS else label


def fails(error):
    raise error


def hold_gil(metadata):
    re.match(r"(a|aa)+$", "a" * 60 + "b")


def alarm(metadata):
    assert threading.current_thread() is threading.main_thread()
    rings = []
    signal.signal(signal.SIGALRM, lambda number, frame: rings.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    while not rings:
        time.sleep(0.01)
    return 1.0


def stop_signals(metadata):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        os.kill(os.getpid(), number)
    child = subprocess.Popen(["sleep", "60"])
    child.terminate()
    assert child.wait() == -signal.SIGTERM
    fork = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    fork.start()
    fork.terminate()
    fork.join()
    return float(fork.exitcode == -signal.SIGTERM)


def leave_children(metadata):
    child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with open(metadata["pids"], "w") as file:
        file.write(str(child.pid))
    time.sleep(60)


def fork_and_return(metadata):
    return 2.0 if os.fork() else 3.0


def chatter(metadata):
    print("from the function", flush=True)
    os.write(1, bytes(range(256)))
    return float(sys.stdin.read() == "")


DEEDS = {
    "raise": lambda m: fails(KeyError("no such word")),
    "odd": lambda m: fails(Odd(1, 2)),
    "sys.exit": lambda m: sys.exit(3),
    "interrupt": lambda m: fails(KeyboardInterrupt()),
    "hold_gil": hold_gil,
    "sleep": lambda m: time.sleep(60),
    "_exit": lambda m: os._exit(0),
    "segfault": lambda m: ctypes.string_at(0),
    "kill": lambda m: os.kill(os.getpid(), signal.SIGKILL),
    "alarm": alarm,
    "asyncio": lambda m: asyncio.run(asyncio.sleep(0, 1.0)),
    "sqlite": lambda m: connection.execute("select 1.0").fetchone()[0],
    "stop_signals": stop_signals,
    "leave_children": leave_children,
    "fork_and_return": fork_and_return,
    "chatter": chatter,
    "num_calls": lambda m: num_calls,
    "environment": lambda m: float("MASTER_ADDR" in os.environ or "torch" in sys.modules),
}


def worker(prompt, response, label, metadata):
    time.sleep(0.3)
    return os.getpid() % 65536


def late_first(prompt, response, label, metadata):
    time.sleep(0.4 - 0.1 * label)
    return label


def batch(prompts, responses, labels, metadata):
    assert all(isinstance(part, list) and len(part) == len(labels) for part in (prompts, responses, metadata))
    if "raise" in labels:
        raise KeyError("no such word")
    if "few" in labels:
        return [1.0]
    return tuple(10 * len(labels) + label for label in labels)


under_way = most = 0


async def wait(prompt, response, label, metadata):
    global under_way, most
    under_way += 1
    most = max(most, under_way)
    try:
        if label == "block":
            time.sleep(60)
        if label == "exit":
            os._exit(1)
        await asyncio.sleep(60 if label == "sleep" else 0.1)
        return most
    finally:
        under_way -= 1

"""
TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("functions") / "functions.py"
    file.write_text(FUNCTIONS)
    return file


def reward_of(file: Path, name: str = "score", **options: Any) -> FunctionReward:
    return FunctionReward(
        f"{file}:{name}", lambda ids: "answer", **{"timeout_s": TIMEOUT_S, "world": ONE_RANK, **options}
    )


@pytest.fixture
def open_reward(file: Path) -> Iterator[Callable[..., FunctionReward]]:
    opened: list[FunctionReward] = []

    def make(name: str = "score", *, source: Path = file, **options: Any) -> FunctionReward:
        opened.append(reward_of(source, name, **options))
        return opened[-1]

    yield make
    for reward in opened:
        reward.close()


@pytest.fixture(scope="module")
def shared(file: Path) -> Iterator[FunctionReward]:
    """Its worker dies in some tests and is replaced in the next."""
    reward = reward_of(file, on_error=RewardErrors.exclude, workers=1)
    yield reward
    reward.close()


FAULTS = {
    "raise": ("error", r"KeyError: 'no such word' \(.*functions.py:\d+ in fails\)"),
    "odd": ("error", r"Odd: 1 \(.*functions.py:\d+ in fails\)"),
    "sys.exit": ("error", "SystemExit: 3"),
    "interrupt": ("error", "KeyboardInterrupt"),
    "hold_gil": (
        "timeout",
        r"TimeoutError: it did not end within reward.timeout_s=2 \(it was at .*functions.py:\d+ in hold_gil\)",
    ),
    "_exit": ("crash", "its worker ended with exit status 0"),
    "segfault": ("crash", r"its worker was ended by SIGSEGV \(at .*functions.py:\d+ in <lambda>\)"),
    "kill": ("crash", "its worker was ended by SIGKILL; the kernel does so when memory is exhausted"),
}


@pytest.mark.parametrize("label", FAULTS)
def test_a_fault_is_the_calls_alone_and_says_where_it_was(shared: FunctionReward, label: str) -> None:
    kind, text = FAULTS[label]
    shared.collect()
    start = time.monotonic()
    scores = shared.score(rollout_of([0.5, label, 2.5])).tolist()
    assert time.monotonic() - start < 20
    assert scores[0] == 0.5 and math.isnan(scores[1]) and scores[2] == 2.5
    counts = shared.collect()
    assert counts.pop(f"reward/function/num_{kind}") == 1.0 and set(counts.values()) == {0.0}
    assert re.search(text, shared.last_failure), shared.last_failure


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("alarm", 1.0),
        ("asyncio", 1.0),
        ("sqlite", 1.0),
        ("stop_signals", 1.0),
        ("fork_and_return", 2.0),
        ("chatter", 1.0),
    ],
)
def test_what_a_program_may_do_a_function_may(shared: FunctionReward, label: str, expected: float) -> None:
    assert shared.score(rollout_of([label, 0.5])).tolist() == [expected, 0.5], shared.last_failure


def test_a_worker_keeps_state_and_has_nothing_of_the_trainers_world(
    open_reward: Callable[..., FunctionReward], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "0")
    reward = open_reward(workers=1)
    assert reward.score(rollout_of(["num_calls", "num_calls"])).tolist() == [1.0, 2.0]
    assert reward.score(rollout_of(["num_calls", "environment"])).tolist() == [3.0, 0.0]


def test_the_first_failure_of_each_kind_is_printed(shared: FunctionReward, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    shared._reported.clear()
    shared.score(rollout_of(["raise", "raise", "sys.exit"]))
    printed = caplog.text
    assert printed.count("The response is left out") == 1 and "counted in reward/function/num_error" in printed


def is_running(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_what_a_call_started_ends_with_its_worker(open_reward: Callable[..., FunctionReward], tmp_path: Path) -> None:
    rollout = rollout_of(["leave_children"])
    rollout.metadata[0]["pids"] = str(tmp_path / "pids")
    with pytest.raises(RunError, match="did not end within reward.timeout_s=1"):
        open_reward(timeout_s=1.0).score(rollout)
    wait_for(lambda: not is_running(int((tmp_path / "pids").read_text())))


PARENT = """
import os, signal, sys
from hetero_ppo.reward.function_pool import FunctionPool, FunctionSpec
pool = FunctionPool(FunctionSpec(sys.argv[1], "reward.function", 60.0, 2))
pool.open()
ticket = pool.submit([(["", "", "leave_children", {"pids": name}], (0,)) for name in sys.argv[2:]], 2)
while not all(os.path.exists(name) and os.path.getsize(name) for name in sys.argv[2:]):
    pass
print(*pool.processes(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_parent_that_is_killed_and_so_does_what_they_started(file: Path, tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("one", "two")]
    done = subprocess.run(
        [sys.executable, "-c", PARENT, f"{file}:score", *names],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    workers = [int(process) for process in done.stdout.split()]
    assert len(workers) == 2, done.stderr
    children = [int(Path(name).read_text()) for name in names]
    wait_for(lambda: not any(is_running(process) for process in workers + children))


@pytest.mark.parametrize("workers", [1, 3])
def test_as_many_workers_as_the_option_says(open_reward: Callable[..., FunctionReward], workers: int) -> None:
    scores = open_reward("worker", workers=workers, timeout_s=60.0).score(rollout_of([None] * 4 * workers))
    assert len(set(scores.tolist())) == workers


def test_a_function_with_a_model_on_the_gpu_gets_one_worker(
    open_reward: Callable[..., FunctionReward], tmp_path: Path
) -> None:
    (tmp_path / "torch" / "cuda").mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "cuda" / "__init__.py").write_text("def is_initialized(): return True\n")
    (tmp_path / "model.py").write_text("import torch.cuda\ndef score(p, r, l, m): return 1.0\n")
    reward = open_reward(source=tmp_path / "model.py")
    reward.check()
    assert "up to 1 worker process (derived)" in reward.describe()


def test_scores_are_in_the_order_of_the_rows(open_reward: Callable[..., FunctionReward]) -> None:
    assert open_reward("late_first", workers=4).score(rollout_of([0, 1, 2, 3])).tolist() == [0, 1, 2, 3]


def test_a_batch_function_gets_lists(open_reward: Callable[..., FunctionReward]) -> None:
    reward = open_reward("batch", batch=3, on_error=RewardErrors.exclude)
    assert reward.score(rollout_of([1, 2, 3, 4])).tolist() == [31, 32, 33, 14]
    assert reward.score(rollout_of([1, "raise", 3, 4])).isnan().tolist() == [True, True, True, False]
    assert "KeyError" in reward.last_failure
    assert reward.score(rollout_of([1, "few", 3, 4])).isnan().tolist() == [True, True, True, False]
    assert "it has 1 values for 3 responses; it must return a finite number for every response" in reward.last_failure


@pytest.mark.parametrize(("concurrency", "most"), [(2, 2), (None, 8)])
def test_calls_of_an_async_function_wait_together(
    open_reward: Callable[..., FunctionReward], concurrency: int | None, most: int
) -> None:
    reward = open_reward("wait", concurrency=concurrency)
    assert reward.score(rollout_of([None] * 8)).max() == most


@pytest.mark.parametrize("label", ["sleep", "block", "exit"])
def test_an_async_call_that_fails_takes_no_other_with_it(
    open_reward: Callable[..., FunctionReward], monkeypatch: pytest.MonkeyPatch, label: str
) -> None:
    monkeypatch.setattr(function_pool, "CANCEL_S", 0.3)
    reward = open_reward("wait", timeout_s=1.0, on_error=RewardErrors.exclude)
    assert reward.score(rollout_of([None, None, label, None])).isnan().tolist() == [False, False, True, False]
    expected = (
        "its worker ended with exit status 1"
        if label == "exit"
        else "did not end within reward.timeout_s=1 (it was at "
    )
    assert expected in reward.last_failure


def test_a_file_that_changes_under_way_stops_the_run(
    open_reward: Callable[..., FunctionReward], tmp_path: Path
) -> None:
    (tmp_path / "helper.py").write_text("import os\nend = os._exit\n")
    source = tmp_path / "changing.py"
    source.write_text("from helper import end\ndef score(p, r, label, m): return end(1) if label else 1.0\n")
    reward = open_reward(source=source, workers=1, on_error=RewardErrors.exclude)
    assert reward.score(rollout_of([0])).tolist() == [1.0]
    (tmp_path / "helper.py").write_text("import os\nend = os._exit  # another\n")
    with pytest.raises(RunError, match=r"helper.py has changed since the run began"):
        reward.score(rollout_of([1, 0]))


VALUES = [
    "datetime.datetime(2020, 1, 2, 3, 4, 5, 6)",
    "datetime.date(2020, 1, 2)",
    "datetime.time(3, 4)",
    "datetime.timedelta(days=1, microseconds=3)",
    "decimal.Decimal('1.10')",
    r"b'\xff\x00'",
    r"'\ud800 \u2028'",
    "{'a': [None, True, 1.5, {'b': 10**30}]}",
]


@pytest.mark.parametrize("value", VALUES)
def test_labels_reach_the_function_as_they_are(value: str) -> None:
    expected = eval(value, {"datetime": datetime, "decimal": decimal})
    assert parse(frame({"label": expected})[4:]) == {"label": expected}


def test_a_label_that_cannot_be_handed_over_is_an_error(open_reward: Callable[..., FunctionReward]) -> None:
    with pytest.raises(RunError, match="in a label or in metadata a set cannot be handed to a reward function"):
        open_reward().score(rollout_of([{1, 2}]))


class Unwilling:
    def __float__(self) -> float:
        raise ValueError("not today")

    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (True, 1.0),
        (decimal.Decimal("0.5"), 0.5),
        (fractions.Fraction(1, 4), 0.25),
        (numpy.float32(0.5), 0.5),
        (numpy.int64(3), 3.0),
        (numpy.bool_(True), 1.0),
        (numpy.array(2.0), 2.0),
        (torch.tensor(0.5), 0.5),
        (torch.tensor(True), 1.0),
        (10**30, 1e30),
    ],
)
def test_numbers_of_all_libraries_are_numbers(value: Any, score: float) -> None:
    assert as_score(value) == score


#: Values that are no score, and the words of their errors.
NO_SCORES = [
    ("1.0", "it is a str"),
    (b"1", "it is a bytes"),
    ([1.0], "it is a list"),
    (numpy.array([1.0]), "it is a ndarray of shape [1]"),
    (torch.zeros(1), "it is a Tensor of shape [1]"),
    (1j, "it is a complex"),
    (numpy.complex64(1), "it is a complex64"),
    (10**39, "it is beyond float32"),
    (10**5000, "it is beyond float32"),
    (1e39, "it is beyond float32"),
    (Unwilling(), "it is a Unwilling (not today)"),
    (None, ""),
    (decimal.Decimal("NaN"), ""),
    (numpy.float32("inf"), ""),
]


@pytest.mark.parametrize(("value", "problem"), NO_SCORES, ids=range(len(NO_SCORES)))
def test_what_is_no_number_is_named_by_its_type(value: Any, problem: str) -> None:
    found = as_score(value)
    assert isinstance(found, list) and found[1] == problem and len(found[0]) <= 200


def test_progress_is_reported_while_a_call_runs(
    open_reward: Callable[..., FunctionReward], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(function, "PROGRESS_S", 0.05)
    noted: list[float] = []
    open_reward("worker", progress=lambda: noted.append(time.monotonic())).score(rollout_of([None]))
    assert len(noted) >= 3


LOAD_FAULTS = {
    "def score(p, r, l, m)\n    return 1\n": r"cannot be imported: SyntaxError: .*\(.*bad.py:1\)",
    "x = 1\nx.y\n": r"cannot be imported: AttributeError: .*bad.py:2 in <module>\)",
    "import nowhere.at_all\n": r"it needs the module 'nowhere', which is not installed here and not next to it \(.*bad.py:1 in <module>\)",
    "from . import helpers\n": "relative import .*; a file that is named by its path belongs to no package",
    "import os\nos._exit(3)\n": "its worker ended with exit status 3 while it imported the module",
    "import sys\nsys.exit('no')\n": r"SystemExit: no \(.*bad.py:2 in <module>\)",
    "def other(): pass\n": "has no function 'score'; it has other",
    "def score(prompt, response): pass\n": r"it takes \(prompt, response\), but is called with 4 arguments",
    "def score(*, prompt): pass\n": "is called with 4 arguments",
    "async def score(p, r, l, m): yield 1.0\n": "it is a generator",
}


@pytest.mark.parametrize("source", LOAD_FAULTS)
def test_a_function_that_cannot_be_loaded_is_named_with_its_line(
    open_reward: Callable[..., FunctionReward], tmp_path: Path, source: str
) -> None:
    (tmp_path / "bad.py").write_text(source)
    with pytest.raises(ValueError, match=f"^reward.function is '.*bad.py:score': .*{LOAD_FAULTS[source]}"):
        open_reward(source=tmp_path / "bad.py").check()


def test_concurrency_is_of_async_functions_alone(open_reward: Callable[..., FunctionReward]) -> None:
    with pytest.raises(ValueError, match="reward.concurrency is 2, but .* is not `async def`"):
        open_reward(concurrency=2).check()


def test_neighbours_of_the_file_are_found_and_hide_nothing(
    open_reward: Callable[..., FunctionReward], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, beside = tmp_path / "here", tmp_path / "beside"
    for folder in (here, beside):
        folder.mkdir()
        (folder / "helper.py").write_text(f"value = {int(folder is beside)}.0\n")
    (beside / "queue.py").write_text("raise RuntimeError('not the library')\n")
    (beside / "json.py").write_text("import queue, helper\ndef score(p, r, l, m): return helper.value\n")
    (here / "package").mkdir()
    (here / "package" / "own.py").write_text("from . import two\ndef score(p, r, l, m): return two.value\n")
    (here / "package" / "two.py").write_text("value = 2.0\n")
    monkeypatch.chdir(here)
    assert open_reward(source=beside / "json.py").score(rollout_of([None])).tolist() == [1.0]
    assert open_reward(source=Path("package.own")).score(rollout_of([None])).tolist() == [2.0]


def test_the_worker_needs_the_standard_library_alone() -> None:
    script = Path(importlib.import_module("hetero_ppo.reward.function_worker").__file__ or "")
    code = (
        f"import runpy, sys; runpy.run_path({str(script)!r}); print('asyncio' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split() == ["False", "False"], done.stderr

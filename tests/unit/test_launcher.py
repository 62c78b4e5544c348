from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from hetero_ppo.cli import launcher, ranks
from hetero_ppo.cli.launcher import describe_failure, main
from hetero_ppo.errors import EXIT_STOPPED

TORCHRUN = ["--standalone", "--nproc-per-node", "1"]


def failure(exit_code: int, after_s: int = 0) -> ProcessFailure:
    found = ProcessFailure(local_rank=0, pid=1, exitcode=exit_code, error_file="")
    found.timestamp = 1_000_000 + after_s
    return found


@pytest.mark.parametrize(
    ("exit_code", "text", "status"),
    [
        (2, "rank 3 ended with exit status 2; see the error above", 2),
        (-9, "rank 3 was ended by SIGKILL (signal 9)", 137),
        (-signal.SIGTERM, "rank 3 was ended by SIGTERM (signal 15)", 143),
    ],
)
def test_a_failed_rank_is_one_line(exit_code: int, text: str, status: int) -> None:
    assert describe_failure(3, failure(exit_code)) == (text, status)


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        (ChildFailedError("x", {1: failure(2)}), "error: rank 1 ended with exit status 2; see the error above\n", 2),
        (
            ChildFailedError("x", {0: failure(2), 1: failure(1)}),
            "error: rank 0 ended with exit status 2; see the error above\n",
            2,
        ),
        # Rank 0 has only seen that rank 1 was gone, but was looked at first.
        (
            ChildFailedError("x", {0: failure(1), 1: failure(-9)}),
            "error: rank 1 was ended by SIGKILL (signal 9)\n",
            137,
        ),
        # torchrun has ended rank 0 since rank 1 had failed.
        (
            ChildFailedError("x", {1: failure(2), 0: failure(-15)}),
            "error: rank 1 ended with exit status 2; see the error above\n",
            2,
        ),
        (
            ChildFailedError("x", {1: failure(2), 0: failure(-9, 30)}),
            "error: rank 1 ended with exit status 2; see the error above\n",
            2,
        ),
        (ChildFailedError("x", {0: failure(-15)}), "error: rank 0 was ended by SIGTERM (signal 15)\n", 143),
        (SignalException("x", signal.SIGTERM), "error: the run was stopped by SIGTERM\n", 143),
    ],
)
def test_the_end_of_a_failed_run_is_one_line(
    error: Exception, line: str, status: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(args: object) -> None:
        raise error

    monkeypatch.setattr(launcher, "run", run)
    assert main([*TORCHRUN, "program.py"]) == status
    assert capfd.readouterr().err == line


def test_a_run_that_ends_well_says_nothing(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(launcher, "run", lambda args: None)
    assert main([*TORCHRUN, "program.py"]) == 0
    assert capfd.readouterr().err == ""


def test_a_stop_is_one_though_torchrun_ends_the_slower_rank(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(args: object) -> None:
        raise ChildFailedError("x", {1: failure(EXIT_STOPPED), 0: failure(-signal.SIGTERM)})

    monkeypatch.setattr(launcher, "run", run)
    assert main([*TORCHRUN, "program.py"]) == EXIT_STOPPED
    assert capfd.readouterr().err == ""


def test_what_ranks_get_by_the_environment_ends_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args: object) -> None:
        os.environ |= {"HETERO_PPO_STORE_FILE": "/of/the/run", "HETERO_PPO_RUN_KEY": "of the run"}

    monkeypatch.setattr(launcher, "run", run)
    monkeypatch.setenv("HETERO_PPO_RUN_KEY", "mine")
    monkeypatch.delenv("HETERO_PPO_STORE_FILE", raising=False)
    assert main([*TORCHRUN, "program.py"]) == 0
    assert os.environ["HETERO_PPO_RUN_KEY"] == "mine" and "HETERO_PPO_STORE_FILE" not in os.environ


def test_real_ranks_speak_once_and_nothing_is_lost(tmp_path: Path) -> None:
    """Both ranks find the same mistake, and rank 1 another one before: torchrun ends the rank that is left, at any moment."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, pathlib, sys, time\n"
        "from hetero_ppo.cli.ranks import say_error\n"
        f"reported = pathlib.Path({str(tmp_path / 'reported')!r})\n"
        "if os.environ['LOCAL_RANK'] == '1':\n"
        "    say_error('of rank 1')\n"
        "    reported.touch()\n"
        "while not reported.exists(): time.sleep(0.01)\n"
        "say_error('of both')\n"
        "sys.exit(2)\n"
    )
    command = [sys.executable, "-m", "hetero_ppo.cli.launcher", "--standalone", "--nproc-per-node", "2", str(program)]
    # Without OMP_NUM_THREADS torchrun has a warning of its own.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert lines.count("error: of both") + lines.count("error (rank 1): of both") == 1
    assert lines.count("error (rank 1): of rank 1") == 1
    last = [line for line in lines if "exit status 2; see the error above" in line]
    assert len(last) == 1 and len(lines) == 3


def test_two_sigterms_end_a_run_at_once(tmp_path: Path) -> None:
    """The first asks for a stop after a step that takes longer than the test; the ranks' second is torchrun's."""
    program = tmp_path / "program.py"
    program.write_text(
        "import pathlib, sys, time\n"
        "from hetero_ppo.trainers.stopping import StopRequests\n"
        "with StopRequests(600.0):\n"
        f"    pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-m", "hetero_ppo.cli.launcher", *TORCHRUN, str(program)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as run:
        assert run.stderr is not None
        while not (tmp_path / "ready").exists():
            assert run.poll() is None
            time.sleep(0.05)
        (rank,) = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        run.send_signal(signal.SIGTERM)
        assert "SIGUSR1: the run stops with a checkpoint after this step" in run.stderr.readline()
        time.sleep(launcher._StopRequest.SAME_REQUEST_S + 0.1)
        run.send_signal(signal.SIGTERM)
        text = run.stderr.read()
    assert run.returncode == 128 + signal.SIGTERM
    assert text.splitlines()[-1] == "error: the run was stopped by SIGTERM" and "Traceback" not in text
    assert not Path(f"/proc/{rank}").exists()


def test_torchruns_other_records_stay(caplog: pytest.LogCaptureFixture) -> None:
    name, beginnings = next(iter(launcher.REPLACED_RECORDS.items()))
    drop = launcher._Drop(beginnings)
    records = [logging.LogRecord(name, logging.ERROR, "", 0, text, None, None) for text in (beginnings[0], "disk full")]
    assert [drop.filter(record) for record in records] == [False, True]


def test_without_torchrun_every_error_is_printed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "LOCAL_RANK", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    ranks.say_error("a")
    ranks.say_error("a")
    assert capfd.readouterr().err == "error: a\nerror: a\n"

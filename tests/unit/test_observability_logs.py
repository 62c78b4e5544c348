"""Each rank prints the right log lines in the right form."""

from __future__ import annotations

import json
import logging
import math
import sys
import time

import pytest

from hetero_ppo.config.schema import LogFormat, LogLevel
from hetero_ppo.observability.logs import ONCE, PACKAGE, console_logging

log = logging.getLogger(f"{PACKAGE}.somewhere")


def log_all() -> None:
    log.debug("step 3 took 2 s")
    log.info("100 % of it\nin two lines")
    log.warning("of this rank")
    log.warning("of every rank", extra=ONCE)
    log.error("broken")


def printed(
    capsys: pytest.CaptureFixture[str], level: LogLevel = LogLevel.info, form: LogFormat = LogFormat.text
) -> list[str]:
    with console_logging(level, form):
        log_all()
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


TEXT = ["100 % of it", "in two lines", "warning: of this rank", "warning: of every rank", "error: broken"]


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (LogLevel.debug, ["step 3 took 2 s", *TEXT]),
        (LogLevel.info, TEXT),
        (LogLevel.warning, TEXT[2:]),
        (LogLevel.error, TEXT[4:]),
    ],
)
def test_levels(
    level: LogLevel, expected: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert printed(capsys, level) == expected


def test_other_ranks_print_what_they_alone_know(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert printed(capsys, LogLevel.debug) == ["rank 3: warning: of this rank", "rank 3: error: broken"]


def test_json_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, messages in (
        ("0", ["100 % of it\nin two lines", "of this rank", "of every rank", "broken"]),
        ("1", ["of this rank", "broken"]),
    ):
        monkeypatch.setenv("RANK", rank)
        lines = [json.loads(line) for line in printed(capsys, form=LogFormat.json)]
        assert [line["message"] for line in lines] == messages
        assert {(line["rank"], line["logger"]) for line in lines} == {(int(rank), log.name)}
        assert lines[-1]["level"] == "error" and abs(lines[-1]["time"] - time.time()) < 60
        assert not any("data" in line or "traceback" in line for line in lines)


def test_json_has_data_and_tracebacks(capsys: pytest.CaptureFixture[str]) -> None:
    with console_logging(form=LogFormat.json):
        log.info("step 3", extra={"data": {"step": 3, "loss": math.nan}})
        try:
            raise KeyError("gone")
        except KeyError:
            log.exception("failed")
    data, traceback = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert data["data"] == {"step": 3, "loss": None}
    assert "KeyError: 'gone'" in traceback["traceback"] and traceback["message"] == "failed"


def test_an_inner_block_replaces_the_outer_one_and_the_end_restores_it(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger(PACKAGE)
    before = (logger.handlers[:], logger.level, logger.propagate)
    with console_logging():
        with console_logging(LogLevel.error):
            log_all()
        log.info("outside")
    assert capsys.readouterr().out.splitlines() == ["error: broken", "outside"]
    assert (logger.handlers, logger.level, logger.propagate) == before


def test_a_configured_root_logger_does_not_print_twice(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        assert printed(capsys) == TEXT
    finally:
        logging.getLogger().removeHandler(handler)

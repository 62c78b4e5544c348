"""Log lines on the console: levels, a filter by rank, text or JSON.

Modules log with ``logging.getLogger(__name__)``, and never print. ``console_logging`` puts what they log on stdout:

- rank 0 prints everything from ``run.log_level`` on; the other ranks print warnings and errors, with their rank;
- a warning that every rank logs carries ``extra=ONCE``, and only rank 0 prints it;
- figures are attached as ``extra={"data": {...}}``, which the JSON format writes unchanged.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from hetero_ppo.config.schema import LogFormat, LogLevel
from hetero_ppo.observability.json_text import json_text

#: Name of the logger above those of all modules of the package.
PACKAGE = "hetero_ppo"
#: ``extra`` of a warning that every rank logs and only rank 0 prints.
ONCE = {"once": True}


class RankFilter(logging.Filter):
    """Filter that lets rank 0 print everything, and other ranks only warnings and errors of their own."""

    def __init__(self, rank: int) -> None:
        """Take the rank.

        Args:
            rank: Rank of this process in the world.
        """
        super().__init__()
        self._rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether this rank prints a record."""
        return self._rank == 0 or (record.levelno >= logging.WARNING and "once" not in vars(record))


class TextFormatter(logging.Formatter):
    """Formatter for text: the message, after the level of a warning or error and after a rank that is not 0."""

    def __init__(self, rank: int) -> None:
        """Take the rank.

        Args:
            rank: Rank of this process in the world.
        """
        super().__init__()
        self._where = "" if rank == 0 else f"rank {rank}: "

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"{self._where}{level}{super().format(record)}"


class JsonFormatter(logging.Formatter):
    """Formatter for JSON lines: time, level, rank, logger, message, and data or a traceback if there is one."""

    def __init__(self, rank: int) -> None:
        """Take the rank.

        Args:
            rank: Rank of this process in the world.
        """
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        """Return the JSON of a record. Numbers that are not finite are null."""
        line: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "rank": self._rank,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if "data" in vars(record):
            line["data"] = vars(record)["data"]
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json_text(line)


class ConsoleHandler(logging.Handler):
    """Handler that prints on stdout, above a progress bar if the terminal has one. A failure to print ends the run, as with ``print``."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record at once."""
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


@contextlib.contextmanager
def console_logging(level: LogLevel = LogLevel.info, form: LogFormat = LogFormat.text) -> Iterator[None]:
    """Print what the package logs while the block runs. An inner block replaces the settings of an outer one.

    Args:
        level: Lowest level that is printed.
        form: Form of the lines.
    """
    rank = int(os.environ.get("RANK", "0"))
    handler = ConsoleHandler()
    handler.addFilter(RankFilter(rank))
    handler.setFormatter(JsonFormatter(rank) if form is LogFormat.json else TextFormatter(rank))
    logger = logging.getLogger(PACKAGE)
    before = logger.handlers[:], logger.level, logger.propagate
    # Without propagation: a library that configures the root logger would print every line again.
    logger.handlers[:], logger.propagate = [handler], False
    logger.setLevel(level.value.upper())
    try:
        yield
    finally:
        logger.handlers[:], _, logger.propagate = before
        logger.setLevel(before[1])

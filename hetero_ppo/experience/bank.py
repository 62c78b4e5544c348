"""The bank: responses on disk as they complete, so that a run that was killed does not ask the generator for them a second time.

There is one file for each PPO step since the last checkpoint. A resumed run comes to the same weights, seeds and prompts, which a file's
key is made from. A file with another key holds the responses of another run, and is dropped.

Every line begins with the CRC-32 of its JSON. Damaged lines are dropped and counted, and so are lines of older versions, which had no
checksum. The other lines are used, and the generator is asked for what is missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import zlib
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from hetero_ppo.disk import writing
from hetero_ppo.types import Response

log = logging.getLogger(__name__)

REMEDY = "choose another run.dir, or set rollout.bank=false"


def bank_key(**parts: Any) -> str:
    """Return the SHA-256 of everything that a step's responses depend on, as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class RolloutBank:
    """The files of a run's bank, on the generator's rank alone.

    Args:
        folder: Folder of the files, which is made when it is needed.
        resumes: Whether to keep the files that an earlier run left there; False removes them.
    """

    def __init__(self, folder: Path, *, resumes: bool) -> None:
        self.folder = folder
        self._file: FileIO | None = None
        self._lock = threading.Lock()
        if not resumes:
            self.forget(None)

    def begin(self, step: int, key: str) -> list[tuple[int, Response]]:
        """Open a step's file, which ``add`` then writes to.

        Args:
            step: Number of PPO steps that are done.
            key: Key of the step (``bank_key``).

        Returns:
            Pairs of place and response that the file has under this key, without the damaged ones, in the order of completion.

        Raises:
            RunError: The disk is full.
        """
        self.end()
        path = self._path(step)
        found = _read(path, key) if path.exists() else _Found([], [], None)
        if found.fault is not None:
            log.warning(f"bank of responses: {path}: {found.fault}; the generator is asked for them again")
        with self._lock, writing(path, "bank of responses", remedy=REMEDY):
            self.folder.mkdir(parents=True, exist_ok=True)
            # The file is written again without damaged lines, and without the line that a kill has cut.
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                file.writelines(line + b"\n" for line in found.lines or [_line({"key": key})])
            partial.rename(path)
            self._file = path.open("ab", buffering=0)
        return found.banked

    def add(self, place: int, response: Response) -> None:
        """Write one response, from any thread. It survives the end of the process, but not a crash of the machine.

        Raises:
            RunError: The disk is full.
        """
        line = _line({"place": place, "response": asdict(response)}) + b"\n"
        with self._lock, writing(self.folder, "bank of responses", len(line), REMEDY):
            rest = memoryview(line)
            while self._file is not None and rest:
                rest = rest[self._file.write(rest) :]

    def end(self) -> None:
        """Close the step's file."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._file = None

    def forget(self, done: int | None) -> None:
        """Remove the files of steps that a checkpoint covers.

        Args:
            done: Number of PPO steps of that checkpoint; None removes all files.
        """
        for path in self.folder.glob("step_*"):
            if done is None or int(path.stem.removeprefix("step_")) < done:
                path.unlink()

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}.jsonl"


@dataclass(frozen=True)
class _Found:
    """The contents of a file."""

    lines: list[bytes]  # the line of the key and the lines of ``banked``; empty where the key is another
    banked: list[tuple[int, Response]]
    fault: str | None  # what is damaged, for the user


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record).encode()
    return b"%08x %s" % (zlib.crc32(text), text)


def _record(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line; None when it is damaged."""
    checksum, _, text = line.partition(b" ")
    return json.loads(text) if checksum == b"%08x" % zlib.crc32(text) else None


def _read(path: Path, key: str) -> _Found:
    whole = path.read_bytes().split(b"\n")[:-1]  # a kill has cut what follows the last end of a line
    if not whole:
        return _Found([], [], None)
    first = _record(whole[0])
    if first is None:
        is_older = whole[0].startswith(b"{")
        what = (
            "an older version wrote it, without checksums"
            if is_older
            else "its first line, which says whose responses they are, is damaged"
        )
        return _Found([], [], f"{what}: its {len(whole) - 1} responses are dropped")
    if first != {"key": key}:
        return _Found([], [], None)
    lines, banked = [whole[0]], []
    for line in whole[1:]:
        record = _record(line)
        if record is not None:
            lines.append(line)
            banked.append((record["place"], _response(record["response"])))
    num_damaged = len(whole) - len(lines)
    return _Found(
        lines, banked, f"{num_damaged} of {len(whole) - 1} responses are damaged and dropped" if num_damaged else None
    )


def _response(values: dict[str, Any]) -> Response:
    earlier = tuple((label, count) for label, count in values["earlier"])
    return Response(**{**values, "earlier": earlier})

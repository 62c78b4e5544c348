"""Responses on disk as they complete: a run that is killed does not ask the engine for them a second time.

One file for each PPO step since the last checkpoint. A resumed run comes to the same weights, seeds and prompts, which is what a
file's key says; under another key its responses are not those of this run and are dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from hetero_ppo.types import Response


def bank_key(**parts: Any) -> str:
    """SHA-256 of what decides over a step's responses, as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class RolloutBank:
    """The files of a run. On the engine's rank alone.

    Args:
        folder: made when it is needed.
        resumes: keep what a run before left there; False: it is a new run, and that is removed.
    """

    def __init__(self, folder: Path, *, resumes: bool) -> None:
        self.folder = folder
        self._file: IO[str] | None = None
        self._lock = threading.Lock()
        if not resumes:
            self.forget(None)

    def begin(self, step: int, key: str) -> list[tuple[int, Response]]:
        """From here on ``add`` writes to this step's file.

        Args:
            step: PPO steps done.
            key: of the step (``bank_key``).

        Returns:
            (place, response) of what is there under this key, in the order of completion.
        """
        self.end()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(step)
        banked, intact = _read(path, key) if path.exists() else ([], 0)
        with self._lock:
            self._file = path.open("r+" if intact else "w", encoding="utf-8")
            if intact:  # a line that a kill has cut goes
                self._file.truncate(intact)
                self._file.seek(0, os.SEEK_END)
            else:
                self._write({"key": key})
        return banked

    def add(self, place: int, response: Response) -> None:
        """Write one response; from any thread. It survives the process, if not the machine."""
        with self._lock:
            if self._file is not None:
                self._write({"place": place, "response": asdict(response)})

    def end(self) -> None:
        """Close the step's file."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._file = None

    def forget(self, done: int | None) -> None:
        """Remove the files of steps that a checkpoint has behind it.

        Args:
            done: PPO steps of that checkpoint; None: all files.
        """
        for path in self.folder.glob("step_*.jsonl"):
            if done is None or int(path.stem.removeprefix("step_")) < done:
                path.unlink()

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}.jsonl"

    def _write(self, record: dict[str, Any]) -> None:
        """The caller holds the lock."""
        assert self._file is not None
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


def _read(path: Path, key: str) -> tuple[list[tuple[int, Response]], int]:
    """(place, response) of a file, and how many of its bytes are whole lines; nothing and 0 when the key is another."""
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    if not whole or json.loads(whole[0]) != {"key": key}:
        return [], 0
    banked = []
    for record in map(json.loads, whole[1:]):
        response = Response(**record["response"])
        earlier = tuple((label, count) for label, count in response.earlier)
        banked.append((record["place"], replace(response, earlier=earlier)))
    return banked, sum(map(len, whole))

"""A data set: token ids of every example, what was left out, and a fingerprint."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import itertools
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from tqdm import tqdm

from hetero_ppo.config.schema import OverlongPrompts
from hetero_ppo.data.node_share import Place
from hetero_ppo.data.reading import FileFacts, Row
from hetero_ppo.data.storage import Codec, ExampleWriter, StoredExamples
from hetero_ppo.observability.progress import PlainProgress, progress

#: Rows that are handed to the tokenizer in one call.
BLOCK_ROWS = 1024
#: Beside the stored examples: what became of the rows, and tokens of every row.
REPORT_FILE, LENGTHS_FILE = "report.json", "lengths.bin"

T = TypeVar("T")


class Example(Protocol):
    """What every kind of example offers."""

    @property
    def num_tokens(self) -> int:
        """Length that the limit applies to."""

    @property
    def all_ids(self) -> list[list[int]]:
        """Every token list of the example, for the fingerprint."""


E = TypeVar("E", bound=Example)


@dataclass(frozen=True)
class LoadReport:
    """What became of the rows of a file."""

    path: str
    num_rows: int
    num_overlong: int  # left out
    num_identical: int  # preference pairs whose two answers are the same, left out
    token_lengths: Sequence[int]  # of every row that was read, over-long ones included
    max_tokens: int  # the limit
    limit_field: str
    notes: tuple[str, ...] = ()  # what else to print about the file

    @property
    def num_kept(self) -> int:
        return self.num_rows - self.num_overlong - self.num_identical

    def describe(self) -> str:
        """How many rows are used, what was left out for which reason, and the notes, one a line."""
        left_out = []
        if self.num_overlong:
            left_out.append(f"{self.num_overlong} longer than {self.limit_field}={self.max_tokens} tokens")
        if self.num_identical:
            left_out.append(f"{self.num_identical} whose chosen and rejected answers are the same")
        rest = f"; left out: {', '.join(left_out)}" if left_out else ""
        return "\n".join([f"{self.path}: {self.num_kept} of {self.num_rows} rows{rest}", *self.notes])


@dataclass(frozen=True)
class Dataset(Generic[E]):
    """Examples in file order."""

    examples: Sequence[E]
    report: LoadReport
    fingerprint: str  # sha256 over the token ids of all examples

    def __len__(self) -> int:
        return len(self.examples)


def encode_in_blocks(
    path: str, rows: Iterable[Row], encode: Callable[[Sequence[Row]], list[T]]
) -> Iterator[tuple[Row, T]]:
    """Each row with its encoding, in file order; tokenizers are many times faster on blocks than on single texts."""
    remaining = iter(rows)
    counter: tqdm | PlainProgress[Row] = progress(description=f"tokenise {path}", unit="row")
    with counter as bar:
        while block := list(itertools.islice(remaining, BLOCK_ROWS)):
            yield from zip(block, encode(block), strict=True)
            bar.update(len(block))


@dataclass(frozen=True)
class DatasetRules:
    """How the rows of a file become a data set."""

    max_tokens: int  # the limit
    limit_field: str  # option that sets it
    overlong: OverlongPrompts  # what to do with a longer example
    is_identical: Callable[[Any], bool]  # whether an example teaches nothing because its two answers are the same
    notes: Callable[
        [FileFacts], Sequence[str]
    ]  # lines to print about what the whole file has and lacks; it may refuse the file


def make_dataset(
    path: str, encoded: Iterable[tuple[Row, E]], rules: DatasetRules, codec: Codec[E], place: Place
) -> Dataset[E]:
    """Apply the length limit and make the fingerprint.

    Args:
        path: Data file.
        encoded: Its rows with their examples; looped over where the data is read.
        rules: What is done with them.
        codec: How examples are stored.
        place: Which process reads, and where the examples are stored.

    Raises:
        ValueError: over-long rows where ``overlong`` is error, or nothing left.
    """

    def build(folder: Path) -> None:
        try:
            report, digest = _build(path, encoded, rules, folder, codec)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ValueError(
                f"{path}: no room for its tokens and texts in {folder.parent}; set TMPDIR to a folder with room for three times the file"
            ) from error
        values = {**dataclasses.asdict(report), "token_lengths": None}
        (folder / LENGTHS_FILE).write_bytes(array("I", report.token_lengths).tobytes())
        (folder / REPORT_FILE).write_text(json.dumps({"report": values, "fingerprint": digest}), encoding="utf-8")

    return place.share(build, lambda folder: _open(folder, codec))


def _build(
    path: str, encoded: Iterable[tuple[Row, E]], rules: DatasetRules, folder: Path, codec: Codec[E]
) -> tuple[LoadReport, str]:
    """Write the examples that are kept; what became of the rows, and the fingerprint."""
    longest: tuple[str, int] = ("", 0)
    lengths = array("I")
    num_identical = num_too_long = 0
    facts = FileFacts(path)
    digest = hashlib.sha256()
    with ExampleWriter(folder, codec) as writer:
        for row, example in encoded:
            facts = row.facts or facts
            lengths.append(example.num_tokens)
            if example.num_tokens > rules.max_tokens:
                num_too_long += 1
                longest = max(longest, (row.place, example.num_tokens), key=lambda pair: pair[1])
            elif rules.is_identical(example):
                num_identical += 1
            else:
                writer.append(example)
                add_to_fingerprint(digest, example)
    report = LoadReport(
        path,
        len(lengths),
        num_too_long,
        num_identical,
        lengths,
        rules.max_tokens,
        rules.limit_field,
        tuple(rules.notes(facts)),
    )
    if num_too_long and rules.overlong is OverlongPrompts.error:
        where, tokens = longest
        raise ValueError(
            f"{path}: {num_too_long} of {len(lengths)} rows are longer than {rules.limit_field}={rules.max_tokens} tokens, the "
            f"longest ({where}) has {tokens}; raise {rules.limit_field}, or set "
            "data.overlong_prompts=drop to leave them out"
        )
    if len(writer) == 0:
        raise ValueError(f"no usable row: {report.describe()}")
    return report, digest.hexdigest()


def _open(folder: Path, codec: Codec[E]) -> Dataset[E]:
    written = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    values = written["report"]
    lengths = array("I", (folder / LENGTHS_FILE).read_bytes())
    report = LoadReport(**{**values, "token_lengths": lengths, "notes": tuple(values["notes"])})
    return Dataset(StoredExamples(folder, codec), report, written["fingerprint"])


def add_to_fingerprint(digest: hashlib._Hash, example: Example) -> None:
    """Add the token ids of an example; the fingerprint of a data set covers all of them, in order."""
    for ids in example.all_ids:
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(array("q", ids).tobytes())

"""A data set: the token ids of every example, a report of the rows that were left out, and a fingerprint."""

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
from hetero_ppo.data.node_share import DataPlace
from hetero_ppo.data.reading import FileFacts, Row
from hetero_ppo.data.storage import Codec, ExampleWriter, StoredExamples
from hetero_ppo.observability.progress import PlainProgress, progress

#: Number of rows that the tokenizer gets in one call.
BLOCK_ROWS = 1024
#: Files next to the stored examples: the report on the rows, and the number of tokens of every row.
REPORT_FILE, LENGTHS_FILE = "report.json", "lengths.bin"

T = TypeVar("T")


class Example(Protocol):
    """Interface of all kinds of examples."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the limit applies to."""

    @property
    def all_ids(self) -> list[list[int]]:
        """All token lists of the example, for the fingerprint."""


E = TypeVar("E", bound=Example)


@dataclass(frozen=True)
class DatasetReport:
    """Report on the rows of a file: how many are used, and how many were left out."""

    path: str
    num_rows: int
    num_overlong: int  # too long, left out
    num_identical: int  # preference pairs whose two answers are the same, left out
    token_lengths: Sequence[int]  # tokens of every row that was read, over-long ones included
    max_tokens: int  # most tokens of an example
    limit_field: str  # option that sets this limit
    notes: tuple[str, ...] = ()  # further lines to print about the file

    @property
    def num_kept(self) -> int:
        return self.num_rows - self.num_overlong - self.num_identical

    def describe(self) -> str:
        """Describe how many rows are used and how many were left out for which reason; the notes follow, one per line."""
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
    report: DatasetReport
    fingerprint: str  # sha256 over the token ids of all examples

    def __len__(self) -> int:
        return len(self.examples)


def encode_in_blocks(
    path: str, rows: Iterable[Row], encode: Callable[[Sequence[Row]], list[T]]
) -> Iterator[tuple[Row, T]]:
    """Yield each row with its encoding, in file order. Tokenizers are many times faster on blocks than on single texts."""
    remaining = iter(rows)
    counter: tqdm | PlainProgress[Row] = progress(description=f"tokenise {path}", unit="row")
    with counter as bar:
        while block := list(itertools.islice(remaining, BLOCK_ROWS)):
            yield from zip(block, encode(block), strict=True)
            bar.update(len(block))


@dataclass(frozen=True)
class DatasetRules:
    """Rules that turn the rows of a file into a data set."""

    max_tokens: int  # most tokens of an example
    limit_field: str  # option that sets this limit
    overlong: OverlongPrompts  # treatment of a longer example
    #: Returns whether the two answers of an example are the same, so that it teaches nothing.
    is_identical: Callable[[Any], bool]
    #: Gives lines to print about what the whole file has and lacks; may refuse the file.
    notes: Callable[[FileFacts], Sequence[str]]


def make_dataset(
    path: str, encoded: Iterable[tuple[Row, E]], rules: DatasetRules, codec: Codec[E], place: DataPlace
) -> Dataset[E]:
    """Store the examples that fit the length limit, and compute the fingerprint.

    Args:
        path: Data file.
        encoded: Rows of the file with their examples. Only the process that reads the data iterates over them.
        rules: Rules for the rows.
        codec: Form in which examples are stored.
        place: Process that reads, and folder of the stored examples.

    Raises:
        ValueError: A row is too long and ``overlong`` is error, or no row is left.
    """

    def build(folder: Path) -> None:
        try:
            report, digest = _build(path, encoded, rules, folder, codec)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ValueError(
                f"{path}: no space for its tokens and texts in {folder.parent}; set TMPDIR to a folder with space for three times the file"
            ) from error
        values = {**dataclasses.asdict(report), "token_lengths": None}
        (folder / LENGTHS_FILE).write_bytes(array("I", report.token_lengths).tobytes())
        (folder / REPORT_FILE).write_text(json.dumps({"report": values, "fingerprint": digest}), encoding="utf-8")

    return place.share(build, lambda folder: _open(folder, codec))


def _build(
    path: str, encoded: Iterable[tuple[Row, E]], rules: DatasetRules, folder: Path, codec: Codec[E]
) -> tuple[DatasetReport, str]:
    """Write the examples that are kept; return the report on the rows, and the fingerprint."""
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
    report = DatasetReport(
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
    report = DatasetReport(**{**values, "token_lengths": lengths, "notes": tuple(values["notes"])})
    return Dataset(StoredExamples(folder, codec), report, written["fingerprint"])


def add_to_fingerprint(digest: hashlib._Hash, example: Example) -> None:
    """Add the token ids of an example. The fingerprint of a data set covers the ids of all examples, in order."""
    for ids in example.all_ids:
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(array("q", ids).tobytes())

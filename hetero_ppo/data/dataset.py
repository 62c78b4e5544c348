"""A data set in memory: token ids of every example, what was left out, and a fingerprint."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from hetero_ppo.config.schema import OverlongPrompts
from hetero_ppo.data.reading import FileFacts, Row
from hetero_ppo.observability.progress import progress

#: Rows that are handed to the tokenizer in one call.
BLOCK_ROWS = 1024

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

    examples: list[E]
    report: LoadReport
    fingerprint: str  # sha256 over the token ids of all examples

    def __len__(self) -> int:
        return len(self.examples)


def encode_in_blocks(
    path: str, rows: Iterable[Row], encode: Callable[[Sequence[Row]], list[T]]
) -> Iterator[tuple[Row, T]]:
    """Each row with its encoding, in file order; tokenizers are many times faster on blocks than on single texts."""
    remaining = iter(rows)
    with progress(description=f"tokenise {path}", unit="row") as bar:
        while block := list(itertools.islice(remaining, BLOCK_ROWS)):
            yield from zip(block, encode(block), strict=True)
            bar.update(len(block))


def make_dataset(
    path: str,
    encoded: Iterable[tuple[Row, E]],
    max_tokens: int,
    limit_field: str,
    overlong: OverlongPrompts,
    is_identical: Callable[[E], bool],
    notes: Callable[[FileFacts], Sequence[str]] = lambda facts: (),
) -> Dataset[E]:
    """Apply the length limit and make the fingerprint.

    Args:
        path: Data file.
        encoded: Its rows with their examples.
        max_tokens: The limit.
        limit_field: Option that sets the limit.
        overlong: What to do with a longer example.
        is_identical: Whether an example teaches nothing because its two answers are the same.
        notes: Lines to print about what the whole file has and lacks; it may refuse the file.

    Raises:
        ValueError: over-long rows where ``overlong`` is error, or nothing left.
    """
    examples: list[E] = []
    longest: tuple[str, int] = ("", 0)
    lengths = array("l")
    num_identical = num_too_long = 0
    facts = FileFacts(path)
    for row, example in encoded:
        facts = row.facts or facts
        lengths.append(example.num_tokens)
        if example.num_tokens > max_tokens:
            num_too_long += 1
            longest = max(longest, (row.place, example.num_tokens), key=lambda pair: pair[1])
        elif is_identical(example):
            num_identical += 1
        else:
            examples.append(example)
    report = LoadReport(
        path, len(lengths), num_too_long, num_identical, lengths, max_tokens, limit_field, tuple(notes(facts))
    )
    if num_too_long and overlong is OverlongPrompts.error:
        place, tokens = longest
        raise ValueError(
            f"{path}: {num_too_long} of {len(lengths)} rows are longer than {limit_field}={max_tokens} tokens, the "
            f"longest ({place}) has {tokens}; raise {limit_field}, or set "
            "data.overlong_prompts=drop to leave them out"
        )
    if not examples:
        raise ValueError(f"no usable row: {report.describe()}")
    return Dataset(examples, report, fingerprint(examples))


def fingerprint(examples: Iterable[Example]) -> str:
    """sha256 over the token ids of all examples, in order."""
    digest = hashlib.sha256()
    for example in examples:
        for ids in example.all_ids:
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(array("q", ids).tobytes())
    return digest.hexdigest()

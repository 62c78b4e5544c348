"""A data set in memory: token ids of every example, what was left out, and a fingerprint."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from hetero_ppo.config.schema import OverlongPrompts
from hetero_ppo.data.reading import Row
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
    token_lengths: list[int]  # of every row that was read, over-long ones included
    max_tokens: int  # the limit
    limit_field: str

    @property
    def num_kept(self) -> int:
        return self.num_rows - self.num_overlong - self.num_identical

    def describe(self) -> str:
        """One line: how many rows are used, and what was left out for which reason."""
        left_out = []
        if self.num_overlong:
            left_out.append(f"{self.num_overlong} longer than {self.limit_field}={self.max_tokens} tokens")
        if self.num_identical:
            left_out.append(f"{self.num_identical} whose chosen and rejected answers are the same")
        rest = f"; left out: {', '.join(left_out)}" if left_out else ""
        return f"{self.path}: {self.num_kept} of {self.num_rows} rows{rest}"


@dataclass(frozen=True)
class Dataset(Generic[E]):
    """Examples in file order."""

    examples: list[E]
    report: LoadReport
    fingerprint: str  # sha256 over the token ids of all examples

    def __len__(self) -> int:
        return len(self.examples)


def encode_in_blocks(rows: Sequence[Row], encode: Callable[[Sequence[Row]], list[T]]) -> Iterator[tuple[Row, T]]:
    """Each row with its encoding, in file order; tokenizers are many times faster on blocks than on single texts."""
    with progress(total=len(rows), description=f"tokenise {rows[0].path}", unit="row") as bar:
        for start in range(0, len(rows), BLOCK_ROWS):
            block = rows[start : start + BLOCK_ROWS]
            yield from zip(block, encode(block), strict=True)
            bar.update(len(block))


def make_dataset(
    path: str,
    encoded: Iterable[tuple[Row, E]],
    max_tokens: int,
    limit_field: str,
    overlong: OverlongPrompts,
    is_identical: Callable[[E], bool],
) -> Dataset[E]:
    """Apply the length limit and make the fingerprint.

    Raises:
        ValueError: over-long rows where ``overlong`` is error, or nothing left.
    """
    examples: list[E] = []
    too_long: list[tuple[Row, int]] = []
    lengths: list[int] = []
    num_identical = 0
    for row, example in encoded:
        lengths.append(example.num_tokens)
        if example.num_tokens > max_tokens:
            too_long.append((row, example.num_tokens))
        elif is_identical(example):
            num_identical += 1
        else:
            examples.append(example)
    report = LoadReport(path, len(lengths), len(too_long), num_identical, lengths, max_tokens, limit_field)
    if too_long and overlong is OverlongPrompts.error:
        row, tokens = max(too_long, key=lambda pair: pair[1])
        raise ValueError(
            f"{path}: {len(too_long)} of {len(lengths)} rows are longer than {limit_field}={max_tokens} tokens, the "
            f"longest ({row.place}) has {tokens}; raise {limit_field}, or set "
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

"""Reading rows, and errors that name file, line and field."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from hetero_ppo.data.reading import Row, read_rows


def test_jsonl_keeps_line_numbers_over_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "one"}\n\n  \n{"prompt": "t\xc3\xbc"}')
    rows = read_rows(str(file))
    assert [(row.number, row.text("prompt")) for row in rows] == [(1, "one"), (4, "tü")]


def test_parquet_drops_the_null_keys_that_a_column_of_messages_gets(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    messages = [[{"role": "tool", "content": "3", "name": "sum"}, {"role": "user", "content": "hi"}]]
    pyarrow.parquet.write_table(pyarrow.table({"messages": messages}), file)
    (row,) = read_rows(str(file))
    assert row.messages("messages")[1] == {"role": "user", "content": "hi"}
    with pytest.raises(ValueError, match=r"a\.parquet, row 1, field 'prompt': is missing; the row has: messages"):
        row.text("prompt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', r"line 2: not valid JSON \(.* at column \d+\): \{\"a\":"),
        (b'{"a": 1}\n{"a": "\xff"}\n', r"line 2: not UTF-8 at byte 8: .*xff.*convert the file"),
        (b'{"a": 1}\n[1, 2]\n', r"line 2: expected a JSON object, got list: \[1, 2\]"),
        (b"\n\n", "the file has no rows"),
    ],
)
def test_malformed_jsonl_names_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.jsonl.*" + message):
        read_rows(str(file))


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl"):
        read_rows(str(tmp_path / "nothing.jsonl"))
    csv = tmp_path / "a.csv"
    csv.write_text("a,b")
    with pytest.raises(ValueError, match=r"ends in \.jsonl"):
        read_rows(str(csv))
    parquet = tmp_path / "a.parquet"
    parquet.write_bytes(b"not parquet")
    with pytest.raises(ValueError, match="not a readable parquet file"):
        read_rows(str(parquet))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "is null"),
        (3, "expected text, got int: 3"),
        ("  ", "is empty"),
    ],
)
def test_a_field_that_is_not_text(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"f\.jsonl, line 7, field 'prompt': {message}"):
        Row("f.jsonl", 7, {"prompt": value}).text("prompt")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "expected a list of messages"),
        ("hello", "expected a list of messages"),
        (["hello"], r"field 'm\[0\]': expected an object"),
        ([{"role": "user"}], r"field 'm\[0\]': 'content' has to be text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "'content' has to be text"),
        (
            [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}],
            r"field 'm\[1\]': unknown role 'bot'; known",
        ),
        ([{"role": "assistant", "content": ""}], "the assistant message is empty"),
    ],
)
def test_messages_that_are_not_messages(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Row("f.jsonl", 7, {"m": value}).messages("m")


def test_excerpts_are_short() -> None:
    with pytest.raises(ValueError) as error:
        Row("f.jsonl", 7, {"prompt": ["x" * 1000]}).text("prompt")
    assert len(str(error.value)) < 160

"""Reading rows, and errors that name file, line and field."""

from __future__ import annotations

import datetime
import decimal
import gzip
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
        (b"", "the file has no rows"),
        (b'{"a": 1}\n{"b": {"k": 1, "k": 2}}', "line 2: the key 'k' is there twice in one object"),
        (b'{"a": 1}\n{"a": NaN}', "line 2: NaN is no JSON value"),
        (b'{"a": 1}\n{"a": -Infinity}', "line 2: -Infinity is no JSON value"),
        (b'{"a": 1}\n{"a": 1e999}', "line 2: the number 1e999 is too large"),
        (b'{"a": 1}\n{"a": ' + b"1" * 5000 + b"}", "line 2: a number of 5000 digits"),
        (b'{"a": ' + b"[" * 200_000, "line 1: nested too deeply"),
        (
            b'{"a": "\\ud83d\\ude00"}\n{"a": [{"b": "x\\uD83d"}]}',
            r"line 2: field 'a\[0\]\.b': character 2 is half of a surrogate pair",
        ),
        (b'{"a\\udc00": 1}', "line 1: field 'a.*half of a surrogate pair"),
        (gzip.compress(b'{"a": 1}', mtime=0), "compressed with gzip; unpack it"),
        (b"PAR1....", "is a parquet file; give it a name that ends in .parquet"),
        ('{"a": 1}'.encode("utf-16"), "is text in UTF-16"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_malformed_jsonl_names_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.jsonl.*" + message):
        read_rows(str(file))


def test_lines_may_end_as_on_windows_and_be_long(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": "one"}\r\n\r\n{"a": "' + b"x" * 3_000_000 + b'"}\r\n')
    assert [(row.number, len(row.text("a"))) for row in read_rows(str(file))] == [(1, 3), (3, 3_000_000)]


def test_parquet_values_are_what_a_jsonl_file_would_hold(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    calls = [[{"arguments": {"city": "Oslo"}}], [{"arguments": {"zone": "CET", "day": 1}}]]
    columns = {
        "calls": calls,
        "map": pyarrow.array([[("a", 1), ("b", None)], None], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "day": [datetime.date(2024, 2, 29), None],
        "time": [datetime.datetime(2024, 2, 29, 12, 30), None],
        "price": pyarrow.array([decimal.Decimal("4.50"), decimal.Decimal("4.00")], pyarrow.decimal128(5, 2)),
        "kind": pyarrow.array(["x", "y"]).dictionary_encode(),
        "bytes": [b"ab", None],
        "number": [float("nan"), 1.0],
        "nested": [{"score": [float("inf")]}, None],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    first, second = read_rows(str(file))
    assert [first.value("calls"), second.value("calls")] == calls
    assert first.value("map") == {"a": 1} and second.get("map") is None
    assert (first.value("day"), first.value("time"), first.value("price")) == ("2024-02-29", "2024-02-29T12:30:00", 4.5)
    assert first.text("kind") == "x"
    for field, problem in {"bytes": "type bytes", "number": "is nan", "nested": "is inf"}.items():
        with pytest.raises(ValueError, match=rf"a\.parquet, row 1, field '{field}.*{problem}"):
            first.value(field)


def test_parquet_text_that_is_not_utf8_names_its_row(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    broken = pyarrow.array([b"ok", b"\xff"]).cast(pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": broken}), file)
    with pytest.raises(ValueError, match=r"a\.parquet, row 2, field 'prompt': .*utf-8"):
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
        ([{"role": "assistant", "content": "a", "weight": 0}], r"'m\[0\]\.weight': would not be used"),
        ([{"role": "assistant", "content": "a", "loss_mask": 0}], r"'m\[0\]\.loss_mask': is not read"),
    ],
)
def test_messages_that_are_not_messages(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Row("f.jsonl", 7, {"m": value}).messages("m")


def test_excerpts_are_short() -> None:
    with pytest.raises(ValueError) as error:
        Row("f.jsonl", 7, {"prompt": ["x" * 1000]}).text("prompt")
    assert len(str(error.value)) < 160

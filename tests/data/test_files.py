"""Texts from files of every format are read as the published text is, or refused."""

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from spinlab.data.files import read_file
from spinlab.errors import InputError

ROWS = ["", " = A heading = \n", "A line with \u2028 inside.\n"]  # as WikiText-2 has them


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_rows_of_every_format_are_joined_as_the_published_text_is(tmp_path):
    """The published protocol joins the rows of the split by blank lines."""
    rows = [{"id": n, "text": text} for n, text in enumerate(ROWS)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    files = [
        write(tmp_path / "a.jsonl", lines),
        write(tmp_path / "lines.json", lines),
        write(tmp_path / "list.JSON", json.dumps(rows, indent=2)),
        tmp_path / "a.parquet",
    ]
    for file in files:
        assert read_file(file) == "\n\n".join(ROWS)


@pytest.mark.parametrize("name", ["notes", "notes.txt", "notes.md", "notes.raw"])
def test_any_other_suffix_is_plain_text_with_or_without_a_mark(tmp_path, name):
    assert read_file(write(tmp_path / name, "\ufeffH\u00e9\r\nworld")) == "H\u00e9\nworld"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"\x1f\x8b\x08\x00", "is not UTF-8"),
        ("a.txt", "\ufeffwide".encode("utf-16"), "is not UTF-8"),
        ("a.bin", b"abc\0def", "holds '\\x00'"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", "\ufeff \n", "holds no text"),
        ("a.jsonl", b"[]", "holds no text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2"),
        ("a.jsonl", b'{"text": "a"}\n{"content": "b"}', "row 2 has no string in the field 'text'"),
        ("a.json", b'[{"text": null}]', "row 1 has no string"),
        ("a.json", b"[1, 2]", "row 1 has no string"),
        ("a.json", b'{"text": "\\ud800"}', "holds '\\ud800'"),
        ("a.parquet", b"PAR1", "is not Parquet"),
    ],
)
def test_what_is_no_text_is_one_sentence(tmp_path, name, content, words):
    with pytest.raises(InputError) as error:
        read_file(write(tmp_path / name, content))
    assert words in str(error.value)
    assert name in str(error.value)


def test_a_table_without_the_field_and_a_folder_are_one_sentence(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist([{"body": "a"}]), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="no string in the field 'text': it has body"):
        read_file(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="is a folder: name a file in it"):
        read_file(tmp_path)

"""Rows out of every kind of file, and what is said of files that are none."""

from __future__ import annotations

import gzip
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from data.config import SourceConfig
from data.errors import ReadError
from data.readers import BadRow, Row, read_rows

ROWS: list[dict[str, Any]] = [
    {"prompt": f"p{n}", "completion": "with\nline" if n else 'a "quoted", thing'} for n in range(3)
]
TABLE = pa.Table.from_pylist(ROWS)


def read(path: Path | str, **more: Any) -> list[Any]:
    return list(read_rows(SourceConfig(path=str(path), **more)))


def write_csv(path: Path, separator: str = ",") -> None:
    quoted = [[value.replace('"', '""') for value in row.values()] for row in ROWS]
    lines = [separator.join(f'"{value}"' for value in row) for row in quoted]
    path.write_text(separator.join(ROWS[0]) + "\r\n" + "\r\n".join(lines) + "\r\n", newline="")


def write_stream(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, TABLE.schema) as writer:
        writer.write_table(TABLE)


JSONL = "\n".join(json.dumps(row) for row in ROWS) + "\n"
WRITERS: dict[str, tuple[Callable[[Path], object], list[int] | list[str]]] = {
    "a.jsonl": (lambda path: path.write_text(JSONL), [1, 2, 3]),
    "a.ndjson": (lambda path: path.write_text("\n" + JSONL), [2, 3, 4]),
    "a.jsonl.gz": (lambda path: path.write_bytes(gzip.compress(JSONL.encode())), [1, 2, 3]),
    "list.json": (lambda path: path.write_text(json.dumps(ROWS, indent=2)), [2, 6, 10]),
    "dense.json": (lambda path: path.write_text(json.dumps(ROWS)), [1, 1, 1]),
    "inside.json": (lambda path: path.write_text(json.dumps({"v": {"a": 1}, "x": ROWS}, indent=1)), [6, 10, 14]),
    "lines.json": (lambda path: path.write_text(JSONL), [1, 2, 3]),
    "a.csv": (write_csv, [2, 3, 5]),
    "a.tsv": (lambda path: write_csv(path, "\t"), [2, 3, 5]),
    "a.parquet": (lambda path: pq.write_table(TABLE, path, row_group_size=2), ["row 1", "row 2", "row 3"]),
    "a.feather": (lambda path: pa.feather.write_feather(TABLE, path), ["row 1", "row 2", "row 3"]),
    "a.arrow": (write_stream, ["row 1", "row 2", "row 3"]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows_and_says_where_they_stand(tmp_path: Path, name: str) -> None:
    write, places = WRITERS[name]
    path = tmp_path / name
    write(path)
    assert read(path) == [Row(row, f"{path}:{place}") for row, place in zip(ROWS, places, strict=True)]


TEXT = "one\ntwo\n\n\n  \nthree é\r\nfour"


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("line", [("one", 1), ("two", 2), ("three é", 6), ("four", 7)]),
        ("paragraph", [("one\ntwo", 1), ("three é\nfour", 6)]),
        ("file", [(TEXT, 1)]),
    ],
)
def test_plain_text(tmp_path: Path, unit: str, expected: list[tuple[str, int]]) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(TEXT.encode()))
    assert read(path, text_unit=unit) == [Row({"text": text}, f"{path}:{line}") for text, line in expected]


def test_glob_folder_and_limit(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "deep/c.csv", ".hidden.jsonl", "README", "dataset_info.json", "_x/d.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"n": name}) if name.endswith("jsonl") else f"n\n{name}\n")
    assert [row.values["n"] for row in read(tmp_path)] == ["a.jsonl", "b.jsonl", "deep/c.csv"]
    assert [row.values["n"] for row in read(tmp_path / "*.jsonl")] == ["a.jsonl", "b.jsonl"]
    assert [row.values["n"] for row in read(tmp_path / "**" / "*.csv")] == ["deep/c.csv"]
    assert len(read(tmp_path, limit_rows=2)) == 2
    with pytest.raises(ReadError, match=r"README: cannot tell the kind of file by its name; known endings: \.jsonl"):
        read(tmp_path / "R*")


def test_name_with_brackets_is_a_name_first(tmp_path: Path) -> None:
    path = tmp_path / "a[1].jsonl"
    path.write_text(JSONL)
    assert len(read(path)) == 3


def test_urls(tmp_path: Path) -> None:
    with fsspec.open("memory://corpus/a.jsonl.gz", "wb", compression="gzip") as out:
        out.write(JSONL.encode())
    for path in ("memory://corpus/a.jsonl.gz", "memory://corpus/*.gz", "memory://corpus"):
        rows = read(path)
        assert [row.values for row in rows] == ROWS
        assert rows[0].origin.startswith("memory://")
        assert rows[0].origin.endswith("corpus/a.jsonl.gz:1")
    (tmp_path / "a.jsonl").write_text(JSONL)
    assert len(read(f"file://{tmp_path}/a.jsonl")) == 3
    with pytest.raises(ReadError, match="nosuch://x: cannot be read: Protocol not known"):
        read("nosuch://x")


def test_bad_lines_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n[1]\n{"a": "\xff"}\n{"a": 2}\n')
    first, *bad, last = read(path)
    assert (first.values, last.values) == ({"a": 1}, {"a": 2})
    assert all(isinstance(row, BadRow) for row in bad)
    assert [row.origin for row in bad] == [f"{path}:{line}" for line in (2, 3, 4)]
    assert [row.why.split(":")[0] for row in bad] == ["not JSON", "expected a JSON object, got list", "not UTF-8"]
    table = tmp_path / "a.csv"
    table.write_text("a,b\n1,2\n3\n4,5\n\n6,7,8\n")
    rows = read(table)
    assert [row.origin.rpartition(":")[2] for row in rows if isinstance(row, BadRow)] == ["3", "6"]
    assert [row.values for row in rows if isinstance(row, Row)] == [{"a": "1", "b": "2"}, {"a": "4", "b": "5"}]
    text = tmp_path / "a.txt"
    text.write_bytes(b"one\n\xff\ntwo\n")
    assert [type(row) for row in read(text)] == [Row, BadRow, Row]


BROKEN: dict[str, tuple[bytes | None, str]] = {
    "absent.jsonl": (None, "no such file or folder"),
    "*.absent": (None, "no file matches"),
    "cut.jsonl.gz": (gzip.compress(JSONL.encode() * 99)[:-20], "cannot be read: "),
    "not.jsonl.gz": (b"plain", "cannot be read: "),
    "cut.json": (b'[{"a": 1},\n{"a": 2},\n{"a"', r":3: not JSON, so nothing behind it can be read"),
    "open.json": (b'[{"a": 1},\n{"a": 2}\n', r":3: the JSON list breaks off"),
    "comma.json": (b'[{"a": 1}\n{"a": 2}]', r":2: the JSON list breaks off: expected ',' or '\]'"),
    "number.json": (b"3", "expected a JSON list of objects, got int"),
    "two.json": (b'{"a": [{"x": 1}],\n "b": [{"x": 1}]}', r"one list of objects; its keys are \['a', 'b'\]"),
    "latin.json": (b'[{"a":\n "\xff"}]', r":2: not UTF-8"),
    "latin.txt": (b"a\n\n\xff", r":3: not UTF-8"),
    "quote.csv": (b'a,b\n1,2\n"3,4\n', r":3: not CSV, so nothing behind it can be read"),
    "a.parquet": (b"PAR1 and then nothing", "cannot be read: "),
    "a.arrow": (b"ARROW1 and then nothing", "cannot be read: "),
    "b.arrow": (b"", "cannot be read: "),
    "a.zip": (b"PK", "cannot tell the kind of file by its name"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_cannot_be_read_are_an_error(tmp_path: Path, name: str) -> None:
    content, why = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ReadError, match=why) as failure:
        read(tmp_path / name, text_unit="file")
    assert str(tmp_path / name) in str(failure.value)


def test_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "README").write_text("nothing here")
    with pytest.raises(ReadError, match="the folder holds no file of a known kind"):
        read(tmp_path)


def test_columns_are_renamed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "x", "id": 1}\n{"id": 2}\n')
    good, bad = read(path, columns={"prompt": "q"})
    assert good.values == {"prompt": "x", "id": 1}
    assert bad == BadRow(f"{path}:2", "no column 'q', which `columns` renames to 'prompt'; it has id")
    swapped = read(path, columns={"id": "q", "q": "id"})[0]
    assert swapped.values == {"id": "x", "q": 1}


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str | None, str]] = []

    def load_dataset(name: str, configuration: str | None, *, split: str) -> list[dict[str, Any]]:
        calls.append((name, configuration, split))
        if name == "owner/absent":
            raise ConnectionError("no route")
        return ROWS

    modules: dict[str, Any] = sys.modules
    monkeypatch.setitem(modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read("hub:owner/name", limit_rows=2)[1] == Row(ROWS[1], "hub:owner/name:row 2")
    read("hub:owner/name:english", split="test")
    assert calls == [("owner/name", None, "train"), ("owner/name", "english", "test")]
    with pytest.raises(ReadError, match=r"hub:owner/absent: cannot be loaded .*no route.*needs a network"):
        read("hub:owner/absent")
    monkeypatch.setitem(modules, "datasets", None)
    with pytest.raises(ReadError, match="needs the package `datasets`"):
        read("hub:owner/name")

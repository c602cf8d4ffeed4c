"""Rows out of files, each with the file and the line it came from.

Invariants:

- Files come in sorted order, rows in file order: the same source gives the same rows in the same order.
- Every row of a file comes out, as a ``Row`` or as a ``BadRow``; what cannot be told apart into rows (a corrupt
  archive, a JSON list that breaks off) is a ``ReadError``, never a shorter file.
- Line formats (JSONL, CSV, text by line) and columnar formats stream; a JSON list and text by file are read whole.

The origin of a row is ``file:line`` (the line the row starts on, from 1), and ``file:row N`` (from 1) where the
format has no lines: Parquet, Arrow, hub data sets.
"""

from __future__ import annotations

import csv
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data.config import SourceConfig
from data.errors import ReadError
from data.files import File, find_files, known_endings

HUB = "hub:"


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in its file. ``wanted`` is what the source's ``where`` says of it."""

    values: dict[str, object]
    origin: str
    wanted: bool = True


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read."""

    origin: str
    why: str


def read_rows(source: SourceConfig) -> Iterator[Row | BadRow]:
    """Read every row of a source, marked as ``source.where`` and renamed as ``source.columns`` say.

    Args:
        source: ``path`` may be a file, a glob, a folder (every file of a known kind below it, in sorted order), any
            fsspec URL, or ``hub:NAME``, ``hub:NAME:CONFIGURATION``.

    Raises:
        ReadError: nothing is there, a file is of no known kind, or it breaks off.
    """
    rows = _hub_rows(source) if source.path.startswith(HUB) else _file_rows(source)
    for row in islice(rows, source.limit_rows):
        chosen = _marked(row, source) if isinstance(row, Row) and source.where else row
        yield _renamed(chosen, source) if isinstance(chosen, Row) and chosen.wanted and source.columns else chosen


def content_digest(source: SourceConfig) -> str:
    """A digest of the bytes of all files that a source stands for, in order; of a hub data set, its fingerprint.

    Raises:
        ReadError: as ``read_rows``.
    """
    digest = xxhash.xxh3_128()
    if source.path.startswith(HUB):
        digest.update(str(_hub(source)._fingerprint).encode())
        return str(digest.hexdigest())
    for file in find_files(source.path):
        digest.update(f"{file.name} {file.digest()}".encode())
    return str(digest.hexdigest())


def _marked(row: Row, source: SourceConfig) -> Row | BadRow:
    """The row with what ``where`` says of it. A list holds a value where one of its items is it."""
    wanted = True
    for name, allowed in source.where.items():
        if name not in row.values:
            found = ", ".join(sorted(row.values))
            return BadRow(row.origin, f"no column {name!r}, which `where` asks for; it has {found}")
        value = row.values[name]
        items = value if isinstance(value, list) else [value]
        wanted = wanted and any(_same(item, one) for item in items for one in allowed)
    return replace(row, wanted=wanted)


def _same(value: object, allowed: object) -> bool:
    """Equal, and both or neither a truth value; a number written as text equals the number (CSV holds only text)."""
    if isinstance(value, str):
        return value == (allowed if isinstance(allowed, str) else json.dumps(allowed))
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _renamed(row: Row, source: SourceConfig) -> Row | BadRow:
    values = dict(row.values)
    taken = {}
    for ours, theirs in source.columns.items():
        if theirs not in values:
            found = ", ".join(sorted(values))
            return BadRow(row.origin, f"no column {theirs!r}, which `columns` renames to {ours!r}; it has {found}")
        taken[ours] = values[theirs]
    for theirs in source.columns.values():
        values.pop(theirs, None)
    return Row(values | taken, row.origin, row.wanted)


def _file_rows(source: SourceConfig) -> Iterator[Row | BadRow]:
    for file in find_files(source.path):
        reader = _READERS.get(file.kind())
        if reader is None:
            raise ReadError(f"{file.name}: cannot tell the kind of file by its name; known endings: {known_endings()}")
        try:
            yield from reader(file, source)
        except (OSError, EOFError, zlib.error, pa.ArrowInvalid) as error:
            raise ReadError(f"{file.name}: cannot be read: {error}") from error


def _jsonl(file: File, _: SourceConfig) -> Iterator[Row | BadRow]:
    with file.binary() as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            origin = f"{file.name}:{number}"
            try:
                yield _row(json.loads(line), origin)
            except UnicodeDecodeError as error:
                yield BadRow(origin, f"not UTF-8: {error}")
            except json.JSONDecodeError as error:
                yield BadRow(origin, f"not JSON: {error}")


def _row(value: object, origin: str) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(value, origin)
    return BadRow(origin, f"expected a JSON object, got {type(value).__name__}")


def _json(file: File, source: SourceConfig) -> Iterator[Row | BadRow]:
    """A JSON list, or an object with exactly one list of objects in it; JSONL under this name is read too."""
    text = _text(file)
    try:
        start = _list_start(text)
    except ValueError as error:
        raise ReadError(f"{file.name}: {error}") from error
    if start is None:
        yield from _jsonl(file, source)
        return
    yield from _elements(file, text, start)


def _elements(file: File, text: str, at: int) -> Iterator[Row | BadRow]:
    """The elements of the JSON list whose ``[`` stands before ``at``, each with the line it starts on."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    while True:
        at = _skip(text, at)
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            where = f"{file.name}:{error.lineno}"
            raise ReadError(f"{where}: not JSON, so nothing behind it can be read: {error}") from error
        yield _row(value, f"{file.name}:{line}")
        at = _skip(text, at)
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != "]":
            line += text.count("\n", counted, at)
            raise ReadError(f"{file.name}:{line}: the JSON list breaks off: expected ',' or ']'")


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _list_start(text: str) -> int | None:
    """Position behind the ``[`` of the rows, or None where the text is JSONL.

    Raises:
        ValueError: an object that holds no list of objects, or several.
    """
    first = _skip(text, 0)
    if text[first : first + 1] == "[":
        return first + 1
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        return None
    if not isinstance(whole, dict):
        raise ValueError(f"expected a JSON list of objects, got {type(whole).__name__}")
    lists = [key for key, value in whole.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if not lists and "\n" not in text.strip():
        return None
    if len(lists) != 1:
        raise ValueError(f"expected a JSON list, or an object with one list of objects; its keys are {sorted(whole)}")
    decoder, at = json.JSONDecoder(), first + 1
    while True:
        key, at = decoder.raw_decode(text, _skip(text, at))
        at = _skip(text, _skip(text, at) + 1)
        if key == lists[0]:
            return at + 1
        _, at = decoder.raw_decode(text, at)
        at = _skip(text, at) + 1


def _text(file: File) -> str:
    with file.binary() as opened:
        data = opened.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ReadError(f"{file.name}:{line}: not UTF-8: {error.reason}") from error


def _csv(file: File, _: SourceConfig) -> Iterator[Row | BadRow]:
    delimiter = "\t" if file.kind() == "tsv" else ","
    with file.binary() as opened:
        reader = csv.reader(io.TextIOWrapper(opened, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        line = 1
        try:
            for fields in reader:
                start, line = line, reader.line_num + 1
                origin = f"{file.name}:{start}"
                if header is None:
                    header = fields
                elif fields and len(fields) != len(header):
                    yield BadRow(origin, f"{len(fields)} fields, the header has {len(header)}: {header}")
                elif fields:
                    yield Row(dict(zip(header, fields, strict=True)), origin)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ReadError(f"{file.name}:{line}: not CSV, so nothing behind it can be read: {error}") from error


def _parquet(file: File, _: SourceConfig) -> Iterator[Row | BadRow]:
    with file.binary() as opened:
        yield from _batches(file, pq.ParquetFile(opened).iter_batches(batch_size=1024))


def _arrow(file: File, _: SourceConfig) -> Iterator[Row | BadRow]:
    """Arrow IPC, as a file (Feather version 2) or as a stream."""
    with file.binary() as opened:
        magic = opened.read(6)
        opened.seek(0)
        if magic == b"ARROW1":
            reader = pa.ipc.open_file(opened)
            yield from _batches(file, (reader.get_batch(i) for i in range(reader.num_record_batches)))
        else:
            yield from _batches(file, pa.ipc.open_stream(opened))


def _batches(file: File, batches: Iterator[pa.RecordBatch]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            number += 1
            yield Row(values, f"{file.name}:row {number}")


def _plain(file: File, source: SourceConfig) -> Iterator[Row | BadRow]:
    """Plain text: a column ``text``, with a document per line, per paragraph, or per file. Blank ones are no rows."""
    if source.text_unit == "file":
        text = _text(file)
        if text.strip():
            yield Row({"text": text}, f"{file.name}:1")
        return
    paragraph: list[str] = []
    start = number = 0
    with file.binary() as lines:
        for number, raw in enumerate(lines, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield BadRow(f"{file.name}:{number}", f"not UTF-8: {error.reason}")
                continue
            if source.text_unit == "line":
                if line.strip():
                    yield Row({"text": line}, f"{file.name}:{number}")
            elif line.strip():
                start = start if paragraph else number
                paragraph.append(line)
            elif paragraph:
                yield Row({"text": "\n".join(paragraph)}, f"{file.name}:{start}")
                paragraph = []
    if paragraph:
        yield Row({"text": "\n".join(paragraph)}, f"{file.name}:{start}")


def _hub_rows(source: SourceConfig) -> Iterator[Row | BadRow]:
    for number, values in enumerate(_hub(source), 1):
        yield Row(values, f"{source.path}:row {number}")


def _hub(source: SourceConfig) -> Any:
    name, _, configuration = source.path.removeprefix(HUB).partition(":")
    try:
        import datasets
    except ImportError as error:
        raise ReadError(f"{source.path}: needs the package `datasets`: {error}") from error
    try:
        return datasets.load_dataset(name, configuration or None, split=source.split)
    except Exception as error:  # the library raises errors of half a dozen others; all mean the same here
        raise ReadError(
            f"{source.path}: cannot be loaded from the Hugging Face hub (split {source.split!r}): "
            f"{type(error).__name__}: {error}. A hub name needs a network, or a copy in the local cache; a local "
            "file or folder needs neither"
        ) from error


#: By the kinds that `data.files` knows.
_READERS: dict[str, Callable[[File, SourceConfig], Iterator[Row | BadRow]]] = {
    "jsonl": _jsonl,
    "ndjson": _jsonl,
    "json": _json,
    "parquet": _parquet,
    "arrow": _arrow,
    "feather": _arrow,
    "csv": _csv,
    "tsv": _csv,
    "txt": _plain,
}

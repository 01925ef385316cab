"""Files of data: the rows of local files, as the text that stands in them.

Only the columns that are asked for are read, and no type is guessed. A row is named by its file and line (`train.jsonl:12`; of
Parquet and Arrow by its row), counted from 1, in whatever part of a large file it stands. What is raised is a UserError that
begins with that name. A file's rows are read one after the other: only a list in a .json file, and a .txt file, are held whole.
"""

from __future__ import annotations

import collections
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from cola_ds.config.inputs import cut_name, kind_of, shown
from cola_ds.data.arrow import arrow_file_objects, arrow_rows, columns_and_row, parquet_objects, parquet_rows
from cola_ds.data.columns import OTHER_KIND, Texts, check_columns, no_column, text_of
from cola_ds.errors import UserError, first_line, quoted

Row = dict[str, Any]
T = TypeVar("T")

_USABLE = (
    "use .jsonl, .ndjson, .json, .csv, .tsv (also .gz or .zst of these), .parquet, .arrow, or .txt with data.text=text"
)
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # by their first bytes: names lie
_LONGEST_NUMBER = 4300  # digits, as Python itself limits them: longer ones take time that grows with their square


# Rows


def text_rows(path: Path, columns: Sequence[str]) -> Texts:
    """The named columns of a file's rows. Raises UserError for what is not text."""
    kind = kind_of(path)
    if kind in (".jsonl", ".ndjson", ".json"):
        return _picked(json_rows(path), columns)
    if kind in (".csv", ".tsv"):
        return _table_rows(path, columns, _DELIMITERS[kind])
    if kind == ".parquet":
        return _typed_rows(path, parquet_rows(path, columns))
    if kind == ".arrow":
        return _typed_rows(path, arrow_rows(path, columns))
    if kind == ".txt" and list(columns) == ["text"]:
        return _document(path)
    raise UserError(f"{path}: {_USABLE}")


def object_rows(path: Path, needed: Sequence[str], optional: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """The rows of a file with the columns that each needs, and those that it may have, whatever their values are. Raises
    UserError for a column that is missing."""
    kind = kind_of(path)
    if kind in (".jsonl", ".ndjson", ".json"):
        for place, row in json_rows(path):
            for column in needed:
                if column not in row:
                    raise no_column(place, column, list(row), remedy=OTHER_KIND)
            yield place, {name: row[name] for name in (*needed, *optional) if name in row}
    elif kind in (".csv", ".tsv"):
        place, found, _ = first_row(path)
        names = found or []
        if names:
            check_columns(place, names, needed, OTHER_KIND)
        columns = [*needed, *(name for name in optional if name in names)]
        for place, texts in _table_rows(path, columns, _DELIMITERS[kind]):
            yield place, dict(zip(columns, texts, strict=True))
    elif kind in (".parquet", ".arrow"):
        read = parquet_objects if kind == ".parquet" else arrow_file_objects
        yield from _typed_rows(path, read(path, needed, optional))
    else:
        raise UserError(f"{path}: {_USABLE}")


def first_row(path: Path) -> tuple[str, list[str] | None, Row | None]:
    """The place of a file's first row, the names of its columns and, of JSON, the row; without any row no names."""
    kind = kind_of(path)
    if kind in (".jsonl", ".ndjson", ".json"):
        for place, row in json_rows(path):
            return place, list(row), row
        return str(path), None, None
    if kind in (".csv", ".tsv"):
        for place, header in _fields(path, _DELIMITERS[kind]):
            return place, header, None
        return str(path), None, None
    if kind in (".parquet", ".arrow"):
        ((names, first),) = _typed_rows(path, (columns_and_row(path, each) for each in [kind]))
        return f"{path} row 1", names, first
    if kind == ".txt":
        return str(path), ["text"], None
    raise UserError(f"{path}: {_USABLE}")


def json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """The objects of JSON Lines, or of one list, with their places. Blank lines count as lines, and are no rows."""
    lines, first = _lines(path), True
    for number, line in lines:
        if not line.strip():
            continue
        if first and line.lstrip().startswith("["):
            yield from _list_rows(path, number, line + "".join(rest for _, rest in lines))
            return
        first = False
        place = f"{path}:{number}"
        try:
            row = _DECODER.decode(line.rstrip("\r\n"))
        except (ValueError, RecursionError) as error:
            raise _bad_json(place, error) from None
        yield place, _object(place, row)


def _list_rows(path: Path, number: int, text: str) -> Iterator[tuple[str, Row]]:
    """The objects of a list that begins in line `number` of the file, parsed one by one."""
    counted, at = 0, _skip(text, text.index("[") + 1)
    while text[at : at + 1] != "]":
        number, counted = number + text.count("\n", counted, at), at
        place = f"{path}:{number}"
        try:
            row, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            below = text.count("\n", counted, error.pos) if isinstance(error, json.JSONDecodeError) else 0
            raise _bad_json(f"{path}:{number + below}", error) from None
        yield place, _object(place, row)
        at = _skip(text, at)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            line = number + text.count("\n", counted, at)
            raise UserError(f"{path}:{line}: not valid JSON: a comma or the end of the list must follow a row")
    rest = _skip(text, at + 1)
    if rest < len(text):
        line = number + text.count("\n", counted, rest)
        raise UserError(f"{path}:{line}: not valid JSON: something follows the list")


def _skip(text: str, at: int) -> int:
    found = _BLANKS.match(text, at)
    assert found is not None
    return found.end()


def _distinct(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        ((twin, _),) = collections.Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {shown(twin)} is given twice")
    return row


def _whole_number(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits.lstrip('-'))} digits")
    return int(digits)


_BLANKS = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder(object_pairs_hook=_distinct, parse_int=_whole_number)


def _bad_json(place: str, error: Exception) -> UserError:
    if isinstance(error, RecursionError):
        return UserError(f"{place}: nested too deeply to be read as a row")
    if isinstance(error, json.JSONDecodeError):
        return UserError(f"{place}: not valid JSON: {error.msg} (column {error.colno}); each line must be one object")
    return UserError(f"{place}: not usable JSON: {first_line(error)}")


def _object(place: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{place}: a row must be an object with fields; it is {quoted(row)}")
    return row


def _picked(rows: Iterable[tuple[str, Row]], columns: Sequence[str]) -> Texts:
    for place, row in rows:
        missing = [column for column in columns if column not in row]
        if missing:
            raise no_column(place, missing[0], list(row), row)
        yield place, [text_of(place, column, row[column]) for column in columns]


def _fields(path: Path, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """The fields of each line of separated values, the names of the columns first; a row is named by the line on which it
    begins."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    while True:
        place = f"{path}:{reader.line_num + 1}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{place}: not valid {kind_of(path)[1:]}: {first_line(error)}") from None
        if fields is None:
            return
        if fields:  # no blank line
            yield place, fields


def _table_rows(path: Path, columns: Sequence[str], delimiter: str) -> Texts:
    """Comma or tab separated values: the first row names the columns."""
    header: list[str] | None = None
    wanted: list[int] = []
    for place, fields in _fields(path, delimiter):
        if header is None:
            header = fields
            check_columns(place, header, columns)
            wanted = [header.index(column) for column in columns]
        elif len(fields) != len(header):
            raise UserError(f"{place} has {len(fields)} fields, where the first row names {len(header)}")
        else:
            yield place, [fields[index] for index in wanted]


def _typed_rows(path: Path, rows: Iterator[T]) -> Iterator[T]:
    """The rows that pyarrow reads of a file. What it raises becomes one line."""
    import pyarrow

    try:
        yield from rows
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:  # the last where a column's name is no text
        with _opened(path):  # a pointer of Git LFS is named as such
            pass
        raise UserError(f"{path} cannot be read as {kind_of(path)[1:]}: {cut_name(first_line(error))}") from None


def _document(path: Path) -> Texts:
    """A .txt file is one text, whatever ends its lines."""
    with _opened(path) as stream:
        raw = stream.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + raw.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: not UTF-8: {error.reason}") from None
    if text:
        yield str(path), [text]


# Bytes


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Each line, with its end, and its number. Lines end at newlines alone: Python's text files would also end them elsewhere."""
    with _opened(path) as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8: {error.reason} (byte {error.start + 1})") from None


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked if they are packed."""
    try:
        with open(path, "rb") as raw:
            head = raw.peek(64)
            if head.startswith(b"version https://git-lfs"):
                raise UserError(f"{path} is a pointer of Git LFS, not the data: fetch it with `git lfs pull`")
            packed = next((name for magic, name in _PACKED.items() if head.startswith(magic)), None)
            if packed == "gzip":
                with gzip.open(raw) as stream:
                    yield stream  # type: ignore[misc]
            elif packed == "zstd":
                import pyarrow

                with io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd")) as stream:
                    yield stream
            else:
                yield raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or first_line(error)}") from None

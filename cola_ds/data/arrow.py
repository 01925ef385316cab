"""Parquet and Arrow: rows of typed columns, as the text that stands in them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cola_ds.config.inputs import shown
from cola_ds.data.columns import CONVERSATIONS, OTHER_KIND, Texts, check_columns, text_of
from cola_ds.errors import UserError

Objects = Iterator[tuple[str, dict[str, Any]]]
"""The place to name in an error, and the row."""
_BATCH_ROWS = 1000
_OF_NO_JSON = re.compile("binary|timestamp|date|time|duration|interval|decimal|map")
"""Types whose values JSON does not have: a worker would not hear of them, nor a digest be made."""


def parquet_rows(path: Path, columns: Sequence[str]) -> Texts:
    """The named columns of a Parquet file's rows. Raises what pyarrow raises, and UserError for what is not text."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        check_arrow(str(path), file.schema_arrow, columns)
        yield from arrow_texts(str(path), file.iter_batches(_BATCH_ROWS, columns=list(columns)), columns)


def parquet_objects(path: Path, needed: Sequence[str], optional: Sequence[str]) -> Objects:
    """The columns of a Parquet file's rows, of any type. Raises what pyarrow raises, and UserError for one that is missing."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        columns = _there(path, file.schema_arrow.names, needed, optional)
        yield from arrow_objects(str(path), file.iter_batches(_BATCH_ROWS, columns=columns), columns)


def arrow_rows(path: Path, columns: Sequence[str]) -> Texts:
    """The named columns of the rows of an Arrow file or stream; an empty file has none. Raises as parquet_rows does."""
    with _arrow_file(path) as (schema, batches):
        if schema is not None:
            check_arrow(str(path), schema, columns)
            yield from arrow_texts(str(path), batches, columns)


def arrow_file_objects(path: Path, needed: Sequence[str], optional: Sequence[str]) -> Objects:
    """As parquet_objects, of an Arrow file or stream."""
    with _arrow_file(path) as (schema, batches):
        if schema is not None:
            yield from arrow_objects(str(path), batches, _there(path, schema.names, needed, optional))


@contextmanager
def _arrow_file(path: Path) -> Iterator[tuple[Any, Iterable[Any]]]:
    """The schema and the record batches of an Arrow file or stream; no schema where it is empty."""
    import pyarrow

    if os.path.isfile(path) and os.path.getsize(path) == 0:
        yield None, ()
        return
    with pyarrow.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            file = pyarrow.ipc.open_file(source)
            yield file.schema, (file.get_batch(index) for index in range(file.num_record_batches))
        else:
            source.seek(0)
            stream = pyarrow.ipc.open_stream(source)
            yield stream.schema, stream


def columns_and_row(path: Path, kind: str) -> tuple[list[str] | None, dict[str, Any] | None]:
    """The names of a file's columns and its first row, as Python has its values; None where it has no row."""
    import pyarrow.parquet

    if kind == ".parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            return _first(file.schema_arrow, file.iter_batches(1))
    with _arrow_file(path) as (schema, batches):
        return _first(schema, batches)


def _first(schema: Any, batches: Iterable[Any]) -> tuple[list[str] | None, dict[str, Any] | None]:
    for batch in batches:
        if batch.num_rows:
            names = batch.schema.names
            row = {}
            for name in set(names):
                column = batch.column(names.index(name))
                column.validate(full=True)
                nested = str(column.type).startswith(("list", "large_list", "struct"))
                row[name] = column[0].as_py() if nested else ""  # whether it is text, or holds messages
            return list(names), row
    return None, None


def _there(path: Path, names: list[str], needed: Sequence[str], optional: Sequence[str]) -> list[str]:
    check_columns(str(path), names, needed, OTHER_KIND)
    return [*needed, *(name for name in optional if names.count(name) == 1)]


def check_arrow(source: str, schema: Any, columns: Sequence[str]) -> None:
    """Raise UserError unless the schema has each column, once, and as text."""
    from pyarrow import types

    check_columns(source, schema.names, columns)
    text = (
        types.is_string, types.is_large_string, types.is_string_view,
        types.is_binary, types.is_large_binary, types.is_binary_view, types.is_null,
    )  # fmt: skip
    for column in columns:
        kind = schema.field(column).type
        if types.is_dictionary(kind):
            kind = kind.value_type
        if not any(is_kind(kind) for is_kind in text):
            talk = "role" in str(kind) or "from" in str(kind)
            remedy = f"; {CONVERSATIONS}" if talk and types.is_nested(kind) else ""
            raise UserError(f"{source} has {shown(str(kind))} in column {shown(column)}; it must be text{remedy}")


def arrow_texts(source: str, batches: Iterable[Any], columns: Sequence[str]) -> Texts:
    """The rows of record batches, or of tables, whose schema has been checked."""
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            part = batch.slice(start, _BATCH_ROWS)
            for values in zip(*(_values(part.column(column)) for column in columns), strict=True):
                number += 1
                place = f"{source} row {number}"
                yield place, [text_of(place, column, value) for column, value in zip(columns, values, strict=True)]


def arrow_objects(source: str, batches: Iterable[Any], columns: Sequence[str]) -> Objects:
    """The rows of record batches, or of tables, by column, as Python has their values."""
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            part = batch.slice(start, _BATCH_ROWS)
            held, strange = [], []
            for name in columns:
                column = part.column(name)
                column.validate(full=True)
                held.append(column.to_pylist())
                if _OF_NO_JSON.search(str(column.type)):
                    strange.append(name)
            for values in zip(*held, strict=True):
                number += 1
                place, row = f"{source} row {number}", dict(zip(columns, values, strict=True))
                yield place, {**row, **{name: _as_json(place, name, row[name]) for name in strange}}


def _as_json(place: str, column: str, value: Any) -> Any:
    """A value as JSON would hold it: bytes as the text that they are, times and the like as they are written."""
    return json.loads(
        json.dumps(value, default=lambda one: text_of(place, column, one) if isinstance(one, bytes) else str(one))
    )


def _values(column: Any) -> list[bytes | None]:
    """A column's bytes. Offsets that lead outside are found before they are followed; what is not UTF-8 is found row by row."""
    import pyarrow

    column.validate(full=pyarrow.types.is_dictionary(column.type))
    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    column = column.cast(pyarrow.binary_view() if pyarrow.types.is_string_view(column.type) else pyarrow.large_binary())
    column.validate(full=True)
    return column.to_pylist()

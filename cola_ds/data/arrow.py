"""Parquet and Arrow: rows of typed columns, as the text that stands in them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cola_ds.config.inputs import shown
from cola_ds.data.columns import CONVERSATIONS, Texts, check_columns, text_of
from cola_ds.errors import UserError

_BATCH_ROWS = 1000


def parquet_rows(path: Path, columns: Sequence[str]) -> Texts:
    """The named columns of a Parquet file's rows. Raises what pyarrow raises, and UserError for what is not text."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        check_arrow(str(path), schema, columns)
        yield from arrow_texts(str(path), file.iter_batches(_BATCH_ROWS, columns=list(columns)), columns)


def arrow_rows(path: Path, columns: Sequence[str]) -> Texts:
    """The named columns of the rows of an Arrow file or stream; an empty file has none. Raises as parquet_rows does."""
    import pyarrow

    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return
    with pyarrow.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            file = pyarrow.ipc.open_file(source)
            batches: Iterable[Any] = (file.get_batch(index) for index in range(file.num_record_batches))
            schema = file.schema
        else:
            source.seek(0)
            stream = pyarrow.ipc.open_stream(source)
            batches, schema = stream, stream.schema
        check_arrow(str(path), schema, columns)
        yield from arrow_texts(str(path), batches, columns)


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


def _values(column: Any) -> list[bytes | None]:
    """A column's bytes. Offsets that lead outside are found before they are followed; what is not UTF-8 is found row by row."""
    import pyarrow

    column.validate(full=pyarrow.types.is_dictionary(column.type))
    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    column = column.cast(pyarrow.binary_view() if pyarrow.types.is_string_view(column.type) else pyarrow.large_binary())
    column.validate(full=True)
    return column.to_pylist()

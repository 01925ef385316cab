"""Columns of a row: the text of those that are asked for, or what to say of one that is not there or is no text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cola_ds.config.inputs import shown, shown_names
from cola_ds.errors import UserError, quoted

Texts = Iterator[tuple[str, list[str]]]
"""The place to name in an error, and the text of each column."""

CONVERSATIONS = "conversations are read with data.format=chat"


OTHER_KIND = "the rows of one source are of one kind: list these files as a source of their own in data.train"


def check_columns(place: str, names: list[str], columns: Sequence[str], remedy: str | None = None) -> None:
    """Raise UserError unless each of the columns is among the names, once."""
    for column in columns:
        if column not in names:
            raise no_column(place, column, names, remedy=remedy)
        if names.count(column) > 1:
            raise UserError(f"{place} has column {shown(column)} twice")


def no_column(
    place: str, column: str, names: list[str], row: Mapping[str, Any] | None = None, remedy: str | None = None
) -> UserError:
    """What to raise where there is no such column among `names`; of JSON, `row` may show what was meant."""
    if remedy is not None:
        return UserError(f"{place} has no column {shown(column)}; it has {shown_names(names)}: {remedy}")
    remedy = "name its own in data.prompt and data.completion, or in data.text"
    if {"messages", "conversation", "conversations"} & set(names):
        remedy = CONVERSATIONS
    elif row and any(isinstance(value, list) and value and isinstance(value[0], dict) for value in row.values()):
        remedy = "rows inside an object are not read: the file must be their list, or have one on each line"
    return UserError(f"{place} has no column {shown(column)}; it has {shown_names(names)}: {remedy}")


def text_of(place: str, column: str, value: Any) -> str:
    """A value that is text. Raises UserError for any other: how a number was written is not in the row any more."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{place}: column {shown(column)} is not UTF-8: {error.reason}") from None
    if not isinstance(value, str):
        talk = (
            isinstance(value, list)
            and value
            and isinstance(value[0], dict)
            and bool({"role", "from"} & value[0].keys())
        )
        remedy = f"; {CONVERSATIONS}" if talk else ""
        raise UserError(f"{place} has {quoted(value)} in column {shown(column)}; it must be text{remedy}")
    if not value.isascii():
        check_text(place, value)
    return value


def check_text(place: str, value: str) -> None:
    """Raise UserError for half of a pair of surrogates, which JSON can write, and which is no text."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = quoted(value[error.start])
        raise UserError(f"{place}: {half} is half a letter (a lone surrogate), which is not text") from None

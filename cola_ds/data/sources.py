"""Sources: which files or hub sets data.train and data.eval name, of what format their rows are, and the rows themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from cola_ds.config.data_section import DataConfig, SourceConfig
from cola_ds.config.inputs import find_files, is_hub_name, kind_of, sha256_of, shown_names
from cola_ds.data.arrow import arrow_objects, arrow_texts, check_arrow
from cola_ds.data.columns import check_columns
from cola_ds.data.conversations import Columns, is_talk, kind_of_row
from cola_ds.data.files import first_row, object_rows, text_rows
from cola_ds.data.hub import load_hub
from cola_ds.errors import UserError

_BATCH_ROWS = 1000
Payload = list[str] | dict[str, Any]
"""What is tokenized of a row: its texts, or what a conversation is made of."""
Rows = Iterator[tuple[str, Payload]]
"""The place to name in an error, and the row."""

_OPTIONAL = {
    "messages": ["tools"],
    "conversations": ["system", "tools"],
    "alpaca": ["input", "history", "system"],
    "chat pairs": ["tools"],
}
"""Columns that a row may have beside those that it must have."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of rows: local files, or a split of a set on the hub."""

    name: str
    """As messages and the summary call it."""
    path: str | None
    hub: str | None = None
    hub_config: str | None = None
    revision: str | None = None
    split: str = "train"
    weight: float | None = None
    limit: int | None = None
    format: str = "auto"
    columns: Columns
    may_be_path: bool = False
    """Whether `hub` was given as a plain name, which could be a file's as well."""

    def open(self) -> OpenSource:
        """Find its files, or load it from the hub, and see what its rows are. Raises UserError."""
        files = find_files(self.path) if self.path is not None else []
        table = None
        if self.hub is not None:
            try:
                table = load_hub(self.hub, self.hub_config, self.split, self.revision)
            except UserError as error:
                here = f"; {self.hub} is not here either" if self.may_be_path else ""
                raise UserError(f"{self.name} cannot be loaded: {error}{here}") from None
        return OpenSource(self, files, table)


def sources_of(data: DataConfig, split: str) -> list[Source]:
    """The sources of `split`, "train", "eval" or "watch", as the config names them."""
    given = getattr(data, split)
    assert given is not None
    if data.hub is not None:
        name = f"split {given} of data.hub {data.hub}"
        hub = {"hub": data.hub, "hub_config": data.hub_config, "revision": data.revision, "split": given}
        return [Source(name=name, path=None, format=data.format, columns=_columns(data, None), **hub)]
    return [_source(data, split, each) for each in (given if isinstance(given, list) else [given])]


def _source(data: DataConfig, split: str, given: str | SourceConfig) -> Source:
    own = SourceConfig(path=given) if isinstance(given, str) else given
    may_be_path = own.path is not None and is_hub_name(own.path)
    if may_be_path:
        own = SourceConfig(hub=own.path, **own.model_dump(exclude={"path", "hub"}, exclude_none=True))
    of_split = own.split or ("train" if split == "train" else "validation")
    return Source(
        name=own.path or f"split {of_split} of {own.hub} on the hub", path=own.path, hub=own.hub,
        hub_config=own.hub_config, revision=own.revision, split=of_split, weight=own.weight, limit=own.limit,
        format=own.format or data.format, columns=_columns(data, own), may_be_path=may_be_path,
    )  # fmt: skip


def _columns(data: DataConfig, own: SourceConfig | None) -> Columns:
    said = {name: getattr(own, name, None) or getattr(data, name) for name in ("prompt", "completion", "text")}
    return Columns(**said)


class OpenSource:
    """A source whose files are found: `kind` says what its rows are, as the formats have it."""

    def __init__(self, source: Source, files: list[Path], table: Any):
        self.source, self.files, self._table = source, files, table
        self._seen = [_stamp(path) for path in files]
        self.needed: list[str] = []
        """The columns that every row must have."""
        self._is_empty = False
        self.kind = self._kind()
        """texts of columns: pairs, text; objects: messages, conversations, alpaca, chat pairs."""
        columns = source.columns
        if self.kind in ("pairs", "chat pairs"):
            self.needed = [columns.prompt, columns.completion]
        elif not self.needed:
            self.needed = {
                "text": [columns.text or "text"], "messages": ["messages"], "alpaca": ["instruction", "output"],
            }[self.kind]  # fmt: skip

    def _kind(self) -> str:
        said, columns = self.source.format, self.source.columns
        if columns.text is not None or said == "text":
            return "text"
        if said == "pairs":
            return "pairs"
        place, names, row = self._first()
        if names is None:  # as will be said
            self._is_empty = True
            return "pairs"
        found: str | None = kind_of_row(names, columns)
        if found == "conversations":
            self.needed = [next(name for name in ("conversations", "conversation") if name in names)]
        if found == "pairs" and (said == "chat" or is_talk((row or {}).get(columns.prompt))):
            found = "chat pairs"
        if said == "auto":
            return found or "pairs"  # whose missing column is then named
        if found in (None, "text"):
            raise UserError(
                f"{place} has no conversation: it needs messages, conversations, instruction and output, or {columns.prompt} and "
                f"{columns.completion}; it has {shown_names(names)}"
            )
        return found

    def _first(self) -> tuple[str, list[str] | None, dict[str, Any] | None]:
        """The place of the first row, its columns, and the row itself; without any row no columns."""
        if self._table is not None:
            row = self._table[0] if len(self._table) else None
            return f"{self.source.name} row 1", list(self._table.column_names) if row else None, row
        for path in self.files:
            place, names, row = first_row(path)
            if names is not None:
                return place, names, row
        return self.source.name, None, None

    def rows(self) -> Rows:
        """Its rows, one after the other. Raises UserError for what cannot be read, with file and row."""
        return islice(self._rows(), self.source.limit)

    def _rows(self) -> Rows:
        optional = _OPTIONAL.get(self.kind)
        if self._is_empty:  # a table without rows may have any columns
            return
        if self._table is not None:
            yield from self._hub_rows(optional)
        for path in self.files:
            if optional is None:
                yield from text_rows(path, self.needed)
            else:
                yield from object_rows(path, self.needed, optional)

    def _hub_rows(self, optional: list[str] | None) -> Rows:
        name, table = self.source.name, self._table
        if optional is None:
            check_arrow(name, table.features.arrow_schema, self.needed)
        else:
            check_columns(name, table.column_names, self.needed)
        columns = [*self.needed, *(each for each in optional or [] if each in table.column_names)]
        batches = table.select_columns(columns).with_format("arrow").iter(batch_size=_BATCH_ROWS)
        yield from (arrow_texts if optional is None else arrow_objects)(name, batches, columns)

    def check_unchanged(self) -> None:
        """Raise UserError for a file that is not what it was when the source was opened."""
        for path, stamp in zip(self.files, self._seen, strict=True):
            if _stamp(path) != stamp:
                raise UserError(f"{path} has changed while it was read: start again when it is whole")

    def content(self) -> list[str]:
        """What tells the content of this source from any other: SHA-256 of each file, in order; of a hub's set what datasets
        knows it by."""
        if self._table is not None:
            files = [each["filename"] for each in self._table.cache_files]
            return [self._table._fingerprint, *(_hash(Path(each)) for each in files)]
        return [f"{kind_of(path)} {_hash(path)}" for path in self.files]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:  # as is said where it is read
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _hash(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None

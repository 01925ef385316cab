"""Cache of tokenized data: a source is tokenized once, and its ids are memory-mapped by every process that reads them.

    FOLDER/KEY/tokens.arrow     the record batches of encode.py
    FOLDER/KEY/facts.json       what became of the rows, and the SHA-256 of tokens.arrow and of itself

KEY follows from the content of all that the ids follow from: the source's files, the tokenizer's files, the chat template, the
options, the code and the libraries that tokenize. What is there under a key is whole, and nobody changes it: it is written
beside, and renamed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from cola_ds.config.inputs import sha256_of
from cola_ds.config.schema import DataConfig
from cola_ds.data.encode import DIGEST_BYTES, Counts, Recipe, schema
from cola_ds.errors import first_line

_LIBRARIES = ("transformers", "tokenizers", "jinja2", "pyarrow")
_MARK = "cola-ds-data"
HERE = ".cola-ds-here"
"""The beginning of the names of files by which processes see whether they share a folder: see training/tokenizing.py."""
# Every name here: what may be removed.
_NAMES = re.compile(
    rf"\.{_MARK}-[0-9a-f]{{40}}\.[0-9a-f]{{32}}|{_MARK}-[0-9a-f]{{40}}|{re.escape(HERE)}-[0-9a-f]{{32}}-[0-9]+"
)
_LEFT_S = 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The examples of one source, as record batches of encode.schema()."""

    batches: list[Any]
    counts: Counts
    kind: str
    """What its rows are."""
    content: str
    """SHA-256 of all ids, and of which are trained, in order."""
    duplicates: int
    """Rows whose content an earlier row of the source has."""
    place: Path | None = None
    """Where they are kept; None in memory."""
    found: bool = False
    """Whether they were there already."""


class CacheError(Exception):
    """The cache's folder cannot be used: the reason."""


def cache_folder(data: DataConfig) -> Path | None:
    """The folder that data.cache means; None where nothing is kept."""
    if data.cache == "none":
        return None
    if data.cache is not None:
        return Path(data.cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "cola_ds"


def key_of(content: list[str], limit: int | None, recipe: Recipe, tokenizer: str) -> str:
    """The name of what is tokenized from files of this content by this recipe, with the tokenizer of that hash."""
    said = [
        content,
        limit,
        dataclasses.asdict(recipe),
        tokenizer,
        _code(),
        *map(importlib.metadata.version, _LIBRARIES),
    ]
    return f"{_MARK}-{hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:40]}"


def _code() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def open_tokens(place: Path, verify: bool) -> Tokens | None:
    """What is kept at a place; None where nothing is, or with `verify` where it is not what was written. Raises CacheError."""
    import pyarrow

    try:
        said = json.loads((place / "facts.json").read_bytes())
        facts = said["facts"]
        if said["sha256"] != _sha256(facts):
            return None
        path = place / "tokens.arrow"
        if path.stat().st_size != facts["bytes"] or (verify and sha256_of(path) != facts["sha256"]):
            return None
        file = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
        batches = [file.get_batch(index) for index in range(file.num_record_batches)]
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, RecursionError, pyarrow.ArrowException):
        return None  # damaged
    except OSError as error:
        raise CacheError(error.strerror or first_line(error)) from None
    return Tokens(
        batches=batches, counts=Counts.of(facts["counts"]), kind=facts["kind"], content=facts["content"],
        duplicates=facts["duplicates"], place=place, found=True,
    )  # fmt: skip


def keep_tokens(place: Path, made: Iterator[tuple[Any, Counts]], kind: str) -> Tokens:
    """Write what is made of a source to its place, and open it there. Raises CacheError where that cannot be; nothing is left
    then."""
    import pyarrow

    scratch = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
    try:
        scratch.mkdir(parents=True)
        _sweep(place.parent)
        path = scratch / "tokens.arrow"
        summary = _Summary()
        with open(path, "xb") as out:
            with pyarrow.ipc.new_file(out, schema()) as file:
                for batch, counts in made:
                    summary.take(batch, counts)
                    file.write_batch(batch)
            out.flush()
            os.fsync(out.fileno())
        file = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
        batches = [file.get_batch(index) for index in range(file.num_record_batches)]
        facts = {
            "kind": kind, "counts": summary.counts.said(), "content": content_of(batches),
            "duplicates": summary.duplicates(), "bytes": path.stat().st_size, "sha256": sha256_of(path),
        }  # fmt: skip
        with open(scratch / "facts.json", "x", encoding="utf-8") as out:
            json.dump({"facts": facts, "sha256": _sha256(facts)}, out)
            out.flush()
            os.fsync(out.fileno())
        _publish(scratch, place)
    except OSError as error:  # of this folder: what a source's files make of it is a UserError
        raise CacheError(error.strerror or first_line(error)) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    found = open_tokens(place, verify=False)
    if found is None:
        raise CacheError("what was written there is not there any more")
    return dataclasses.replace(found, found=False)


def hold_tokens(made: Iterator[tuple[Any, Counts]], kind: str) -> Tokens:
    """What is made of a source, in memory."""
    batches, summary = [], _Summary()
    for batch, counts in made:
        summary.take(batch, counts)
        batches.append(batch)
    return Tokens(
        batches=batches, counts=summary.counts, kind=kind, content=content_of(batches), duplicates=summary.duplicates()
    )


class _Summary:
    def __init__(self) -> None:
        self.counts = Counts()
        self._rows: list[numpy.ndarray] = []
        self._digests: list[numpy.ndarray] = []

    def take(self, batch: Any, counts: Counts) -> None:
        self.counts.add(counts)
        self._rows.append(rows_of(batch).copy())
        self._digests.append(digests_of(batch).copy())

    def duplicates(self) -> int:
        if not self._rows:
            return 0
        rows, digests = numpy.concatenate(self._rows), numpy.concatenate(self._digests)
        first = numpy.ones(len(rows), dtype=bool)  # of the examples of a row
        first[1:] = rows[1:] != rows[:-1]
        return int(first.sum() - len(numpy.unique(digests[first])))


def rows_of(batch: Any) -> numpy.ndarray:
    """The row that each example of a batch is from: (examples,) int64."""
    return batch.column(2).to_numpy()


def digests_of(batch: Any) -> numpy.ndarray:
    """What each example's row says, as a digest: (examples,) of bytes."""
    column = batch.column(3)
    start = column.offset * DIGEST_BYTES
    whole = numpy.frombuffer(column.buffers()[1], dtype=f"S{DIGEST_BYTES}", count=len(column), offset=start)
    return whole if len(column) else numpy.empty(0, dtype=f"S{DIGEST_BYTES}")


def flat(column: Any) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The values of a column of lists, one list after the other, and where each begins among them, with their end."""
    return column.values.to_numpy(), column.offsets.to_numpy()


def content_of(batches: list[Any]) -> str:
    """SHA-256 of the ids of all examples, and of which are trained, whatever the batches are."""
    lengths = [numpy.diff(flat(batch.column(0))[1]) for batch in batches]
    digest = hashlib.sha256(numpy.concatenate([*lengths, numpy.empty(0)]).astype(numpy.int64).tobytes())
    for ids, starts in _blocks(batches, lengths):
        digest.update(ids)
        digest.update(starts)
    return digest.hexdigest()


def _blocks(batches: list[Any], lengths: list[numpy.ndarray]) -> Iterator[tuple[bytes, bytes]]:
    """By 1000 examples: their ids, and where their loss begins, int32; where it has gaps or an end, all spans instead."""
    ids: list[numpy.ndarray] = []
    held: list[tuple[int, numpy.ndarray]] = []  # length and spans of each example
    for batch, of_each in zip(batches, lengths, strict=True):
        values, offsets = flat(batch.column(0))
        pairs, places = flat(batch.column(1))
        for place in range(len(of_each)):
            ids.append(values[offsets[place] : offsets[place + 1]])
            held.append((int(of_each[place]), pairs[places[place] : places[place + 1]]))
            if len(held) == 1000:
                yield numpy.concatenate(ids).tobytes(), _starts(held)
                ids, held = [], []
    if held:
        yield numpy.concatenate(ids).tobytes(), _starts(held)


def _starts(held: list[tuple[int, numpy.ndarray]]) -> bytes:
    if all(len(own) == 0 or (len(own) == 2 and own[1] == length) for length, own in held):
        return numpy.array([own[0] if len(own) else length for length, own in held], dtype=numpy.int32).tobytes()
    counts = numpy.array([len(own) for _, own in held], dtype=numpy.int32)
    return b"spans" + counts.tobytes() + numpy.concatenate([own for _, own in held]).astype(numpy.int32).tobytes()


def _sha256(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _publish(scratch: Path, place: Path) -> None:
    """Let a folder appear under its name. Where another process was faster, or what is there is damaged, its own goes away."""
    for _ in range(2):
        try:
            scratch.rename(place)
            return
        except OSError:
            if not os.path.lexists(place):
                raise
            if open_tokens(place, verify=True) is not None:
                return
            aside = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
            with contextlib.suppress(OSError):
                place.rename(aside)
            _remove(aside)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed have left: what nobody has written to for a day."""
    for path in _own(folder):
        with contextlib.suppress(OSError):
            newest = max(each.lstat().st_mtime for each in (path, *path.glob("*")))
            if path.name.startswith(".") and time.time() - newest > _LEFT_S:
                _remove(path)


def _own(folder: Path) -> list[Path]:
    """What is the cache's own in a folder: entries, and what becomes one or has not. Raises OSError."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAMES.fullmatch(path.name) and not path.is_symlink())


def clean(folder: Path) -> tuple[int, int]:
    """Remove what is kept in a folder: how many entries, and their bytes. Nothing of anybody else's. Raises OSError."""
    entries = size = 0
    for path in _own(folder):
        if path.is_dir():
            size += sum(each.lstat().st_size for each in path.rglob("*"))
            shutil.rmtree(path)
            entries += 1
        else:
            path.unlink(missing_ok=True)
    return entries, size

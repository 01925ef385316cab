"""Files of tasks: rows of a task, from files or the hub, as examples."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cola_ds.data.columns import check_text
from cola_ds.data.files import json_rows
from cola_ds.data.hub import load_hub
from cola_ds.data.tasks.catalog import Example, Row, Task
from cola_ds.errors import UserError

_FILES = {"validation": ("validation.jsonl", "val.jsonl", "dev.jsonl")}


@dataclass(frozen=True)
class Rows:
    """The examples of a split."""

    examples: list[Example]
    left_out: dict[str, int]
    """How many rows made no example, by reason: "without answers", for one."""
    source: str
    """Where they were read: a file, or a set on the hub and its split."""


def read_rows(task: Task, folder: str | Path | None, split: str, revision: str | None = None) -> Rows:
    """Every example of `split`, train or validation, from a .jsonl file of the folder, or of its folder of the task's name; from
    the hub where `folder` is None.

    Raises UserError for a set that cannot be loaded, for a split without an example, and, with file and line, for a bad row.
    """
    if folder is None:
        source, rows = _hub_rows(task, split, revision)
    else:
        own = Path(folder, task.name)
        source, rows = _file_rows(own if own.is_dir() else Path(folder), split)
    return examples_of(task, rows, source)


def examples_of(task: Task, rows: Iterable[tuple[str, Row]], source: str) -> Rows:
    """The examples of rows, each of which comes with the place to name in an error.

    Raises UserError for a bad row, and where no row makes an example.
    """
    examples: list[Example] = []
    left_out: collections.Counter[str] = collections.Counter()
    for place, row in rows:
        try:
            found, reasons = task.read(row)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        examples += found
        left_out.update(reasons)
    if not examples:
        raise UserError(f"{source} holds no example of {task.name}{reasons_text(left_out)}")
    return Rows(examples, dict(left_out), source)


def reasons_text(left_out: dict[str, int]) -> str:
    """How many rows were left out and why, as the end of a line; empty where none was."""
    counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    return f"; rows left out: {counts}" if counts else ""


def _file_rows(folder: Path, split: str) -> tuple[str, Iterator[tuple[str, Row]]]:
    names = _FILES.get(split, (f"{split}.jsonl",))
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder} has no {' or '.join(names)}, which the task's {split} split is read from")
    return str(found[0]), _of_text(json_rows(found[0]))


def _of_text(rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
    """The rows; any of their texts may be read."""
    for place, row in rows:
        try:
            check_text(place, json.dumps(row, ensure_ascii=False))
        except RecursionError:  # Python may write a little less deep than it reads
            raise UserError(f"{place}: nested too deeply to be read as a row") from None
        yield place, row


def _hub_rows(task: Task, split: str, revision: str | None) -> tuple[str, Iterator[tuple[str, Row]]]:
    if task.hub is None:
        raise UserError(f"task {task.name} is not on the hub: name the folder of its train.jsonl and validation.jsonl")
    path, config = task.hub
    source = f"{path} {config or ''}".rstrip() + f" {split}"
    try:
        rows = load_hub(path, config, split, revision)
    except UserError as error:
        raise UserError(
            f"cannot load {source} from the hub: {error}; or name a folder with train.jsonl and validation.jsonl"
        ) from None
    return source, ((f"{source} row {number}", row) for number, row in enumerate(rows, 1))

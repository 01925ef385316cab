"""Output files of a report, CSV, PNG and HTML, where it is told to write them. Only an earlier report's own is ever replaced."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cola_ds.errors import UserError

CSV_COLUMNS = (
    "task", "name", "state", "chosen", "method", "links", "lora_ranks", "lr", "optimizer", "num_train", "seed", "dev", "test",
    "metric", "best_step", "steps", "flops", "profiled_flops", "seconds", "folder",
)  # fmt: skip
_CSV_BEGINS = b"task,name,state,chosen,method,"
PNG_TEXT = {"Software": "cola-ds report"}
"""What tells a picture of ours from others."""
_PNG, _PNG_TEXT = b"\x89PNG\r\n\x1a\n", b"tEXtSoftware\0cola-ds report"
_PAGE_BEGINS, _PAGE_LINE_ENDS = b"<!doctype html><!-- cola-ds report, sha256 of what follows: ", b" -->\n"
_PNG_HEAD = 512  # bytes, in which its text stands
_OF_RUNS = (
    "run.yaml", "environment.json", "metrics.jsonl", "evals.jsonl", "knots.jsonl", "links.jsonl", "watch.jsonl", "events.jsonl",
    "result.json", "lock.json", "run.json", "sweep.json", "deepspeed.json", "log.txt", "chain", "earlier",
    "checkpoints", "model",
)  # fmt: skip
_FORMULA = (
    "=",
    "+",
    "-",
    "@",
    "\t",
    "\r",
    "\n",
    "\uff1d",
    "\uff0b",
    "\uff0d",
    "\uff20",
)  # also as East Asian full-width

_SKIPPED = " \0\xa0\u200b\ufeff"  # what a spreadsheet may leave out as it reads


def check_csv(path: Path) -> None:
    """Raise UserError unless that is a new file, or an earlier report's CSV."""
    _check("--csv", path, _CSV_BEGINS, "has a report's columns and nothing else")


def check_picture(option: str, path: Path) -> None:
    """Raise UserError unless that is a new file, or an earlier report's picture."""
    _check(option, path, _PNG, "is a report's own picture")


def _check(option: str, path: Path, begins: bytes, what: str) -> None:
    advice = "name a file of its own"
    try:
        real = path.resolve()
        for folder in real.parents:
            if (folder / "run.json").is_file() and real.relative_to(folder).parts[0] in _OF_RUNS:
                raise UserError(f"{option} {path} belongs to the run in {folder}; {advice}")
        if real.name in _OF_RUNS or (real.suffix == ".log" and real.stem.startswith("seed=")):
            raise UserError(f"{option} {path} has the name of a file that runs write; {advice}")
        if not real.exists():
            return
        if not real.is_file():
            raise UserError(f"{option} {path} is there, and no file; {advice}")
        with open(real, "rb") as there:
            head = there.read(_PNG_HEAD)
    except (OSError, ValueError, RuntimeError) as error:  # also a NUL in it, and links that go in a circle
        if isinstance(error, UserError):
            raise
        raise UserError(f"{option} {str(path)[:200]!r}: {_reason(error)}") from None
    if not head.startswith(begins) or not _is_own(begins, real, head):
        raise UserError(
            f"{option} {path} is there already, and only a file that {what} is replaced; {advice}, or remove it"
        )


def _is_own(begins: bytes, real: Path, head: bytes) -> bool:
    """Whether a file that begins so is what a report wrote."""
    if begins == _PNG:
        return _PNG_TEXT in head
    return _is_page(real) if begins == _PAGE_BEGINS else _is_report(real)


def _is_report(path: Path) -> bool:
    """Whether a CSV has the columns of a report, and no row of another length: nobody has added to it."""
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as there:
            rows = list(csv.reader(there))
    except (OSError, csv.Error):
        return False
    return tuple(rows[0]) == CSV_COLUMNS and all(len(row) == len(CSV_COLUMNS) for row in rows)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def write_file(option: str, path: Path, content: bytes) -> None:
    """Write a file that was checked, atomically: whole or not at all, in place of an earlier one. Raises UserError."""
    real, scratch = path.resolve(), None
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=".", suffix=real.suffix, dir=real.parent)
        with open(handle, "wb") as out:
            out.write(content)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(scratch, 0o666 & ~mask)  # mkstemp's are for their owner alone
        os.replace(scratch, real)
        scratch = None
    except OSError as error:
        raise UserError(f"{option} {path}: {_reason(error)}") from None
    finally:
        if scratch:
            with contextlib.suppress(OSError):
                os.unlink(scratch)


def page_bytes(body: str) -> bytes:
    """A page as a file: a line that vouches for what follows it, which is how a later report knows its own."""
    content = body.encode("utf-8", errors="backslashreplace")
    return _PAGE_BEGINS + hashlib.sha256(content).hexdigest().encode() + _PAGE_LINE_ENDS + content


def check_page(path: Path) -> None:
    """Raise UserError unless that is a new file, or an earlier report's page, as it was written."""
    _check("--html", path, _PAGE_BEGINS, "is a report's page, unchanged,")


def _is_page(path: Path) -> bool:
    line, _, content = path.read_bytes().partition(b"\n")
    return line + b"\n" == _PAGE_BEGINS + hashlib.sha256(content).hexdigest().encode() + _PAGE_LINE_ENDS


def csv_bytes(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = CSV_COLUMNS) -> bytes:
    """Serialise rows as CSV. No cell is a formula to a spreadsheet: a text that would begin one has a ' before it.
    Numbers stay numbers."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, columns)
    writer.writeheader()
    writer.writerows({key: _harmless(value) for key, value in row.items()} for row in rows)
    return out.getvalue().encode("utf-8", errors="backslashreplace")  # a folder's name may be any bytes


def _harmless(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    begins = value.startswith(_FORMULA) or value.lstrip(_SKIPPED).startswith(_FORMULA)
    return f"'{value}" if begins else value

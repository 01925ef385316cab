"""Atomic writes: files and folders that appear whole or not at all, and are on the disk then; names and hashes of files."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path


def write_atomically(path: Path, content: bytes, owner: str = "") -> None:
    """Atomic write: write or replace a file, whole or not at all. What a killed process leaves of it has `owner` in its name."""
    scratch = scratch_beside(path, owner)
    try:
        write_synced(scratch, content)
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def write_folder(target: Path, files: Mapping[str, bytes], owner: str = "") -> None:
    """Write a new folder of files, which appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = scratch_beside(target, owner)
    scratch.mkdir()
    try:
        for name, content in files.items():
            write_synced(scratch / name, content)
        sync_path(scratch)
        publish(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def publish(scratch: Path, target: Path, last: str = "") -> None:
    """Let a folder that is complete appear under its name. Where that has files of somebody else's, its own go beside them, the
    one named `last` after the others."""
    if target.exists():
        for path in sorted(scratch.rglob("*"), key=lambda path: path.name == last):
            if path.is_file():
                place = target / path.relative_to(scratch)
                place.parent.mkdir(parents=True, exist_ok=True)
                path.rename(place)
        shutil.rmtree(scratch)
    else:
        scratch.rename(target)
    sync_path(target.parent)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file that was not there, and have it on the disk before this returns."""
    with open(path, "xb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def sync_path(path: Path) -> None:
    """Have a folder's entries, or a file's content, on the disk before this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_all(folder: Path) -> None:
    """Have all that lies in a folder on the disk before this returns."""
    for path in [*folder.rglob("*"), folder]:
        sync_path(path)


def scratch_beside(path: Path, owner: str = "") -> Path:
    """A name beside `path` that nothing else has; it begins with a dot and with `owner`, if there is one."""
    return path.with_name(f".{owner}-{uuid.uuid4().hex}" if owner else f".{uuid.uuid4().hex}")


def file_name(text: str) -> str:
    """The text as the name of a file or folder."""
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.") or "-"

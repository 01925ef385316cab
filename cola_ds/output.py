"""What a run prints is for people: a stream that is closed, full, or knows no such letter must not end it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Tolerant:
    """A text stream that drops what cannot be written."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed, or cannot encode that
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def tolerant_output() -> Iterator[None]:
    """Inside the block stdout and stderr drop what they cannot take, whoever writes to them."""
    for number in (0, 1, 2):  # one that is closed would be the next file to be opened, and take what is printed
        with contextlib.suppress(OSError):
            while (opened := os.open(os.devnull, os.O_RDWR)) < number:
                pass
            if opened > number:
                os.close(opened)
    before = sys.stdout, sys.stderr
    nothing = open(os.devnull, "w", encoding="utf-8") if None in before else None  # noqa: SIM115
    out, err = (Tolerant(stream or nothing) for stream in before)  # type: ignore[arg-type]
    sys.stdout, sys.stderr = out, err
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before

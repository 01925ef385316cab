"""What this process prints, where nobody takes it: a closed pipe, a full disk, a stream that was closed from the start."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO


class _Patient(io.FileIO):
    """A file descriptor to print to: what cannot be written is lost, and nothing fails for that."""

    lost: OSError | None = None
    """The first error."""

    def __init__(self, number: int):
        # Standard error by a descriptor of its own: DeepSpeed points the usual one elsewhere for a second while it asks the
        # compiler what it has (op_builder/builder.py, 0.19.8), and what the watchdog says then would be lost.
        super().__init__(os.dup(number) if number == 2 else number, "w", closefd=number == 2)
        self._number = number

    def fileno(self) -> int:
        return self._number

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.lost = self.lost or error
            return len(memoryview(data).cast("B"))


def harden() -> None:
    """From now on no print fails, of this process's own code, of a library or of the interpreter's exit, whatever becomes of
    standard output and error; one that was closed is /dev/null, or the next file that is opened would get what is printed."""
    while (held := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(held, True)
    os.close(held)
    sys.stdout, sys.stderr = _open(1, sys.stdout), _open(2, sys.stderr)


def _open(number: int, instead_of: TextIO | None) -> TextIO:
    raw, at_once = _Patient(number), bool(getattr(instead_of, "write_through", False))
    return io.TextIOWrapper(
        raw if at_once else io.BufferedWriter(raw),  # as the interpreter does with -u
        encoding=instead_of.encoding if instead_of else "utf-8",
        errors="backslashreplace",  # names of files need not be UTF-8
        line_buffering=number == 2 or os.isatty(number),
        write_through=at_once,
    )


def lost(stream: TextIO) -> OSError | None:
    """Why what was printed there has not arrived, as far as that is known."""
    buffer = getattr(stream, "buffer", None)
    return getattr(getattr(buffer, "raw", buffer), "lost", None)

"""log.txt of a run's folder: what the run said, start after start. It is only kept: nothing that befalls it fails a run.

Process 0 writes what it says; another process that fails adds why, if the file is the run's. Each line goes into one write at the
file's end, so that lines of several processes do not mix.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import sys
import threading
from pathlib import Path

from cola_ds import notices
from cola_ds.errors import UserError, counted
from cola_ds.run.folder import RunDir
from cola_ds.run.marker import LOG, Marker

_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LOCK_S = 3.0
_MOST_WAITING = 2**20  # bytes that wait for room on the disk: of more, the oldest are lost


class RunLog:
    """The log of a run. Process 0's."""

    def __init__(self, folder: RunDir, world_size: int):
        """It begins with a line that has the date and the command. The folder must be the run's own."""
        self._path = folder.path / LOG
        self._waiting, self._told = b"", False
        self._keeps = False
        self._lock = threading.Lock()
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        try:
            folder.mine.own([LOG])
            _append(self._path, b"", create=True)
            if _ends_inside_a_line(self._path):  # a killed process's last one
                self._waiting = b"\n"
            self._keeps = True
        except OSError as error:
            self._tell(error)
        command = " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
        processes = counted(world_size, "process", "processes")
        self.add(f"== {now} on {socket.gethostname()}, {processes}: {command}")

    def add(self, text: str) -> None:
        """Add a line, or several. Where the disk is full they wait for the next one; the first time, a line says so."""
        if not self._keeps or not self._lock.acquire(timeout=_LOCK_S):  # another thread's write hangs
            return
        failed = None
        try:
            self._waiting = (self._waiting + _bytes(text))[-_MOST_WAITING:]
            while self._waiting:
                self._waiting = self._waiting[_append(self._path, self._waiting) :]
        except OSError as error:
            failed = error
        finally:
            self._lock.release()
        if failed:
            self._tell(failed)

    def _tell(self, error: OSError) -> None:
        if not self._told:
            self._told = True  # before it is said: what is said comes here
            notices.warning(
                f"{self._path} cannot be written ({error.strerror}); the run goes on without what it would keep"
            )


def add_error(folder: Path, rank: int, text: str) -> None:
    """Why a process other than 0 ends, into the log of the run in `folder`, if that has one."""
    where = f"process {rank} on {socket.gethostname()}"
    if where not in text:
        text = f"{where}:\n{text}"
    with contextlib.suppress(OSError, UserError):
        marker = Marker.read(folder)
        if marker is None or LOG not in marker.wrote:
            return
        _append(folder / LOG, _bytes(text))


def _append(path: Path, content: bytes, create: bool = False) -> int:
    """Returns how many bytes of it there was room for."""
    number = os.open(path, _FLAGS | (os.O_CREAT if create else 0), 0o666)
    try:
        return os.write(number, content)
    finally:
        os.close(number)


def _bytes(text: str) -> bytes:
    return f"{text.rstrip()}\n".encode(errors="backslashreplace")


def _ends_inside_a_line(path: Path) -> bool:
    with open(path, "rb") as held:
        end = held.seek(0, os.SEEK_END)
        held.seek(max(0, end - 1))
        return held.read(1) not in (b"", b"\n")

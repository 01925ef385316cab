"""Lock of a run folder: one folder, one run. A lock file says who holds it, and that its holder is alive.

The file's time is renewed every half minute by its holder. It is stale, and taken over, when its holder was a process of this
host that is gone, when it belongs to an earlier start of this very Slurm job, or, where its holder cannot be seen from here,
when it has not been renewed for five minutes. A holder whose lock was taken over ends. Times are compared on the file system
that holds the lock, so that the clocks of hosts do not matter. What no run wrote is never taken over: it may be anybody's.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cola_ds import notices
from cola_ds.config.parsing import parse_json
from cola_ds.errors import UserError, cut, first_line

NAME = "lock.json"
RENEWED_EVERY_S = 30
STALE_AFTER_S = 300
_ENDS_WITHIN_S = 1.0  # unless its file system hangs
_START = ("ticks", "boot", "pid_namespace")
_MOST_BYTES = 2**16
_held: RunLock | None = None


def release_held() -> None:
    """Release the lock that this process holds, if any: before it ends otherwise than by returning."""
    if _held:
        _held.release()


def held_id() -> str | None:
    """What tells the lock that this process holds from any other; None if it holds none."""
    return json.loads(_held._content)["id"] if _held else None


class RunLock:
    """The lock of a run folder, held from `take` to `release`."""

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self._released = threading.Event()
        self._made: list[Path] = []
        self._content = ""
        self._thread: threading.Thread | None = None

    def take(self, lost: Callable[[int], Any] | None = None) -> None:
        """Make the folder if need be, and lock it. Raises UserError naming the run that holds it.

        `lost` ends this process with an exit status, in a thread, where another run has taken the lock over.
        """
        global _held
        self._make_folder()
        mine = {
            "host": socket.gethostname(), "pid": os.getpid(), "started": _start_of(os.getpid()),
            "job": os.environ.get("SLURM_JOB_ID"), "restarts": os.environ.get("SLURM_RESTART_COUNT", "0"),
            "id": uuid.uuid4().hex,
        }  # fmt: skip
        self._content = json.dumps(mine)
        scratch = self.path.with_name(f"{NAME}.{mine['id']}")
        try:
            scratch.write_text(self._content, encoding="utf-8")
            for _ in range(3):
                try:
                    _link(scratch, self.path)
                    self._thread = threading.Thread(target=self._renew, args=(lost,), name="lock", daemon=True)
                    self._thread.start()
                    _held = self
                    return
                except FileExistsError:
                    self._remove_if_stale(scratch)
            raise UserError(f"{self.path} changes hands: several runs start in this folder; start one")
        except OSError as error:
            raise UserError(
                f"run.dir {cut(str(self.path.parent))} cannot be locked: {error.strerror or error}"
            ) from None
        finally:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)

    def release(self) -> None:
        """Unlock, and remove the folder if it is one that `take` made and that nothing was written to."""
        self._released.set()
        if self._thread:
            self._thread.join(_ENDS_WITHIN_S)
        with contextlib.suppress(OSError):
            if _read(self.path) == self._content.encode():
                self.path.unlink()
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()

    def _make_folder(self) -> None:
        folder = self.path.parent
        missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:  # the latter for a path that can be none
            reason = getattr(error, "strerror", None) or first_line(error)
            raise UserError(f"run.dir {cut(str(folder))} cannot be made: {reason}") from None
        self._made = missing

    def _remove_if_stale(self, scratch: Path) -> None:
        try:
            held = _read(self.path)
            if not (holder := _parsed(held)):
                raise OSError(errno.EINVAL, "no run wrote what is in it")
            os.utime(scratch)
            silent_s = scratch.stat().st_mtime - self.path.stat().st_mtime
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(
                f"{self.path} is no lock of a run: {error.strerror or error}; remove it if no run goes on in that folder, or "
                "name another run.dir"
            ) from None
        since_s = max(silent_s, 0)
        if not _is_stale(holder, silent_s):
            where = f"process {holder['pid']} on {holder['host']}"
            if holder.get("job"):
                where += f" (Slurm job {holder['job']})"
            raise UserError(
                f"{self.path.parent} belongs to a run that is still going: {where}, last heard of {since_s:.0f} s ago; "
                f"wait for it, stop it, or name another run.dir (if it is dead, its lock expires {STALE_AFTER_S} s after that)"
            )
        aside = self.path.with_name(f"{NAME}.{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(aside)
            if _read(aside) != held:  # another run was quicker, and this is its lock
                with contextlib.suppress(FileExistsError):
                    _link(aside, self.path)
            aside.unlink()

    def _renew(self, lost: Callable[[int], Any] | None) -> None:
        while not self._released.wait(RENEWED_EVERY_S):
            with contextlib.suppress(OSError):
                if _read(self.path) != self._content.encode():
                    notices.error(f"cola-ds: {self.path} was taken over by another run: this one ends")
                    if lost:
                        lost(3)
                    return
                os.utime(self.path)


def _link(source: Path, target: Path) -> None:
    """Make `target` with the content of `source`, or raise FileExistsError; whole at once where the file system can link."""
    try:
        os.link(source, target)  # also fails over NFS if it is there
    except FileExistsError:
        raise
    except OSError:
        with open(target, "x", encoding="utf-8") as out:
            out.write(source.read_text(encoding="utf-8"))


def holder(folder: Path) -> dict[str, Any] | None:
    """Who holds a run folder's lock, as far as this host can tell; None if nobody does, or the lock is stale."""
    path = folder / NAME
    try:
        held = _parsed(_read(path))
    except OSError:
        return None
    return None if held.get("host") == socket.gethostname() and _is_stale(held, 0) else held


def _read(path: Path) -> bytes:
    """What a lock holds. Raises OSError, also for what is no file: a pipe would be waited for, a link leads elsewhere."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise OSError(errno.EINVAL, "it is not a file")
    with open(path, "rb") as file:
        return file.read(_MOST_BYTES)


def _parsed(content: bytes) -> dict[str, Any]:
    """A lock as `take` wrote it; empty if it is none."""
    try:
        held = parse_json(content.decode(), NAME)
    except ValueError:
        return {}
    if not isinstance(held, dict) or not isinstance(held.get("started"), dict):
        return {}
    texts = [held.get("host"), held.get("id"), *(held["started"].get(name) for name in _START)]
    texts += [held[name] for name in ("job", "restarts") if held.get(name) is not None]
    whole = all(isinstance(text, str) and len(text) < 256 for text in texts)
    return held if whole and type(held.get("pid")) is int and 0 < held["pid"] < 2**31 else {}


def _is_stale(held: dict[str, Any], silent_s: float) -> bool:
    job, restarts = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    if job is not None and held.get("job") == job and held.get("restarts") != restarts:
        return True
    mine = _start_of(os.getpid())
    started = held.get("started", {})
    # Of another host, or where the system does not say when processes began: it cannot be seen from here.
    if held.get("host") != socket.gethostname() or not started["ticks"] or not mine["ticks"]:
        return silent_s > STALE_AFTER_S
    if started["boot"] != mine["boot"]:
        return True  # the host was started again since
    if started["pid_namespace"] != mine["pid_namespace"]:
        return silent_s > STALE_AFTER_S  # in another container: its processes cannot be seen from here
    return {name: started[name] for name in _START} != _start_of(held["pid"])


def _start_of(pid: int) -> dict[str, str]:
    """What tells a process of this host from a later one of the same number. Its ticks are empty if there is none, or this system
    does not say."""
    boot = pid_namespace = ticks = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        pid_namespace = os.readlink("/proc/self/ns/pid")
    with contextlib.suppress(OSError):
        stat_of = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        ticks = "" if stat_of[0] in "ZX" else stat_of[19]  # a dead one that nobody has waited for
    return dict(zip(_START, (ticks, boot, pid_namespace), strict=True))

"""What a process says beside the results of its command, and who keeps it: notices, warnings, errors, how far it is.

    result     what a command is for                                        standard output, always
    line       what a run says of itself on the way: summary, knots         standard output, not with --quiet
    notice     what goes on                                                 standard error, not with --quiet
    Progress   how far it is: a bar at a terminal, else a line (`going`)    standard error, not with --quiet
    warning, error                                                          standard error, always

A run keeps all of it but the bars in its log (run/log.py), whatever of it is shown. Nothing here fails.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO

TELLS_EVERY_S = 30.0  # how far it is, where there is no terminal
BAR_AFTER_S = 3.0  # what is over by then needs no bar
GOING = "cola-ds ... "
"""What lines of progress begin with: who reads a log for what went wrong looks for "cola-ds: "."""
_LOG_WITHIN_S = 3.0

_quiet = False
_bars = 0
_early: list[str] | None = None
_log: Callable[[str], None] | None = None
_log_of_errors: Callable[[str], None] | None = None


def be_quiet(quiet: bool) -> None:
    """Whether this process shows results, warnings and errors alone from now on."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    """Whether notices and bars are left out."""
    return _quiet


def result(text: str) -> None:
    """What a command is for."""
    _say(text, sys.stdout, shown=True)


def line(text: str) -> None:
    """What a run says of itself on the way."""
    _say(text, sys.stdout, shown=not _quiet)


def notice(text: str) -> None:
    """What goes on, without the command's name in front."""
    _say(f"cola-ds: {text}", sys.stderr, shown=not _quiet)


def going(text: str) -> None:
    """How far it is, in a line."""
    _say(f"{GOING}{text}", sys.stderr, shown=not _quiet)


def warning(text: str) -> None:
    """What may have been meant otherwise."""
    _say(f"cola-ds: warning: {text}", sys.stderr, shown=True)


def error(text: str) -> None:
    """Why this process, or another one of the run, ends: one line, or a traceback, as it is to be read."""
    _say(text, sys.stderr, shown=True)
    if _log_of_errors and not _log:
        _within(_log_of_errors, text)


def unsaid(text: str) -> None:
    """For the log alone: whoever called raises it, or shows it by itself."""
    _say(text, sys.stderr, shown=False)
    if _log_of_errors and not _log:
        _within(_log_of_errors, text)


def begin_log() -> None:
    """What is said from now on is a run's, and is kept until it has a folder (`keep_in`). On process 0."""
    global _early, _log, _log_of_errors
    _early, _log, _log_of_errors = [], None, None


def keep_in(log: Callable[[str], None]) -> None:
    """Hand over what has been said since `begin_log`, and all that is to come. `log` must not raise."""
    global _early, _log
    for text in _early or ():
        log(text)
    _early, _log = None, log


def keep_errors_in(log: Callable[[str], None]) -> None:
    """Hand over why this process ends, as long as nothing is kept by `keep_in`. `log` must not raise."""
    global _log_of_errors
    _log_of_errors = log


def end_log() -> None:
    """What is said from now on is no run's."""
    global _early, _log, _log_of_errors
    _early = _log = _log_of_errors = None


def _say(text: str, file: TextIO | None, shown: bool) -> None:
    if shown and file is not None:
        _show(text, file)
    if _early is not None:
        _early.append(text)
    elif _log and threading.current_thread() is threading.main_thread():
        _log(text)
    elif _log:
        _within(_log, text)


def _within(log: Callable[[str], None], text: str) -> None:
    """Log, and wait a moment for that alone: on a file system that hangs, threads that end the process must come to do so."""
    thread = threading.Thread(target=log, args=(text,), name="log", daemon=True)
    with contextlib.suppress(RuntimeError):  # the interpreter ends
        thread.start()
        thread.join(_LOG_WITHIN_S)


def _show(text: str, file: TextIO) -> None:
    with contextlib.suppress(OSError, ValueError):  # full, or closed
        if _bars:  # above the bar, which is drawn anew
            from tqdm import tqdm

            tqdm.write(text, file=file)
            file.flush()
        else:
            print(text, file=file, flush=True)


def bar(**options: Any) -> Any:
    """tqdm's bar, on standard error at a terminal; one that draws nothing elsewhere, and with --quiet. For `close_bar`."""
    global _bars
    from tqdm import tqdm

    if _quiet or not at_terminal():
        return tqdm(disable=True)
    _bars += 1
    return tqdm(file=sys.stderr, dynamic_ncols=True, **options)


def close_bar(its: Any) -> None:
    """Take a bar down."""
    global _bars
    _bars -= not its.disable
    with contextlib.suppress(OSError, ValueError):
        its.close()


@contextmanager
def waiting(what: str, shown: bool = True) -> Iterator[None]:
    """Inside the block, where there is no terminal for the hub's own bars, a line every half minute says that it goes on."""
    if not shown or at_terminal():
        yield
        return
    done, begun = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(TELLS_EVERY_S):
            going(f"{what}: goes on after {time.monotonic() - begun:.0f} s")

    thread = threading.Thread(target=tell, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def of_transformers(what: str, unit: str, shown: bool = True) -> Iterator[None]:
    """Inside the block, what Transformers would draw a bar of is told as Progress (its hook was read in 5.24)."""
    from transformers.utils import logging

    def counted(factory: Any, args: Any, words: Any) -> Any:
        items = args[0] if args else words.get("iterable")
        return factory(*args, **words) if items is None else _told(items, what, unit)

    set_hook = getattr(logging, "set_tqdm_hook", None) if shown else None
    before = set_hook(counted) if set_hook else None
    try:
        yield
    finally:
        if set_hook:
            set_hook(before)


def _told(items: Any, what: str, unit: str) -> Iterator[Any]:
    with Progress(what, unit, len(items)) as progress:
        for done, item in enumerate(items):
            progress.at(done)
            yield item


def at_terminal() -> bool:
    """Whether somebody may be looking at standard error."""
    isatty = getattr(sys.stderr, "isatty", None)  # there may be none, or anything in its place
    with contextlib.suppress(OSError, ValueError):
        return bool(isatty and isatty())
    return False


class Progress:
    """How far something is that may take minutes: a bar at a terminal after the first few seconds, elsewhere a line every half
    minute. A context manager; use it on the process that speaks."""

    def __init__(self, what: str, unit: str, total: float | None = None, shown: bool = True, plural: str = ""):
        """`what` goes on, such as loading; in bytes where the unit is B, and otherwise in counts of `unit`."""
        self.what, self.unit, self.total, self.shown = what, unit, total, shown
        self.plural = plural or f"{unit}s"
        self._begun = self._said = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self.shown and at_terminal():
            self._bar = bar(
                desc=f"cola-ds: {self.what}",
                total=self.total,
                unit=self.unit,
                unit_scale=True,
                delay=BAR_AFTER_S,
                leave=False,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._bar is not None:
            close_bar(self._bar)

    def at(self, done: float) -> None:
        """So much is done, in all."""
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.update(done - self._bar.n)
        elif self.shown and time.monotonic() - self._said > TELLS_EVERY_S:
            self._said = time.monotonic()
            going(f"{self.what}: {self._written(done)} after {self._said - self._begun:.0f} s")

    def _written(self, done: float) -> str:
        if self.unit == "B":
            return f"{done / 1e9:.1f}" + ("" if self.total is None else f" of {self.total / 1e9:.1f}") + " GB"
        last = done if self.total is None else self.total
        return (
            f"{done:,.0f}{'' if self.total is None else f' of {last:,.0f}'} {self.unit if last == 1 else self.plural}"
        )

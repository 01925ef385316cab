"""Signals that ask a run to stop: the first one sets a flag that the steps look at, the second one ends the process.

Python runs its handlers in the main thread alone, which may be waiting inside a collective for minutes. The C handler writes
the signal's number into a pipe at once, and a thread of this module reads it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cola_ds import notices

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_ONE_REQUEST_S = 2.0  # launchers pass a signal on, and send another: what arrives within this time is one request
_AGAIN_AFTER_S = 0.2
_NO_SIGNAL = b"\0"  # ends the thread that reads
_requested = 0
_training = False
_finished = False
_interrupting = False


@dataclass(kw_only=True)
class _Listening:
    """What `listen` began, and what it found."""

    read: int
    write: int
    thread: threading.Thread
    handlers: dict[int, Any]
    wakeup_fd: int


_listening: _Listening | None = None


def requested() -> int:
    """The number of the first signal that asked this process to stop; 0 if none did."""
    return _requested


def listen(say: Callable[[str], None], leave: Callable[[int], None]) -> None:
    """From now on, take the signals. Before `steps_begin`, the first one calls `leave` with exit status 75; a second one, more
    than two seconds later, always calls it with 128 plus the signal's number. `leave` must end the process, or be `interrupt`. In
    the main thread alone, as Python's handlers are; `restore` puts everything back.
    """
    global _listening
    restore()
    read, write = os.pipe()
    os.set_blocking(write, False)
    wakeup_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    handlers: dict[int, Any] = {number: signal.signal(number, _handle) for number in STOPPING}
    thread = threading.Thread(target=_read, args=(read, say, leave), name="signals", daemon=True)
    _listening = _Listening(read=read, write=write, thread=thread, handlers=handlers, wakeup_fd=wakeup_fd)
    thread.start()


def restore() -> None:
    """Take the signals no more: the handlers are those from before `listen`, and nothing is requested or finished.

    Where a process goes on after a run. In the main thread alone, if `listen` was called.
    """
    global _requested, _training, _finished, _interrupting, _listening
    listening, _listening = _listening, None
    if listening:
        signal.set_wakeup_fd(listening.wakeup_fd)
        _interrupting = False
        os.write(listening.write, _NO_SIGNAL)
        listening.thread.join()  # before the handlers: `interrupt` may be about to send once more
        for number, handler in listening.handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that Python did not set
        os.close(listening.read)
        os.close(listening.write)
    _requested, _training, _finished, _interrupting = 0, False, False, False


def interrupt(status: int) -> None:
    """Raise KeyboardInterrupt in the main thread: a `leave` for a process that goes on, such as a notebook's."""
    global _finished, _interrupting
    _finished = _interrupting = True
    main = threading.main_thread().ident
    while _interrupting and main is not None:  # one that comes just before a call of the system does not end that
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(_AGAIN_AFTER_S)


def _handle(number: int, frame: Any) -> None:
    global _interrupting
    if _interrupting:
        _interrupting = False
        raise KeyboardInterrupt


def steps_begin() -> None:
    """From now on, a signal waits for the end of the step."""
    global _training
    _training = True


def finished() -> None:
    """Nothing is left to stop: a signal that still arrives is ignored, such as a launcher's after the first process has gone."""
    global _finished
    _finished = True


def _read(pipe: int, say: Callable[[str], None], leave: Callable[[int], None]) -> None:
    global _requested
    first = 0.0
    while True:
        number = os.read(pipe, 1)[0]
        if number == _NO_SIGNAL[0]:
            return
        if number not in STOPPING or _finished:
            continue
        name = signal.Signals(number).name
        if not _training:
            # Nothing to save, and nothing to say: launchers end so whom another process's mistake leaves behind.
            leave(75)
            continue
        if not _requested:
            _requested, first = number, time.monotonic()
            say(f"{name}: stopping after this step, with a checkpoint")
        elif time.monotonic() - first > _ONE_REQUEST_S:
            notices.error(f"cola-ds: a second signal, {name}: stopping at once")
            leave(128 + number)

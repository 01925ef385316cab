"""Signals are taken during a run, and are the process's own again after it: a notebook goes on."""

import os
import signal
import threading
import time

import pytest

from cola_ds.distributed import signals


@pytest.fixture
def listening():
    """Listen, with what was said and whom was left with."""
    said, left = [], []
    signals.listen(said.append, left.append)
    yield said, left
    signals.restore()


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "signals"]


def until(true, within_s=10):
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_signal_is_a_request_once_the_steps_begin(listening):
    said, left = listening
    os.kill(os.getpid(), signal.SIGUSR1)
    until(lambda: left == [75])
    signals.steps_begin()
    os.kill(os.getpid(), signal.SIGTERM)
    until(signals.requested)
    signals.finished()
    assert left == [75]
    assert len(said) == 1


def test_restore_puts_back_what_was_there():
    """Handlers, the file descriptor, the thread; a second run in the process finds nothing of the first."""
    taken = []
    before = {number: signal.getsignal(number) for number in signals.STOPPING}
    mine = signal.signal(signal.SIGUSR2, lambda number, frame: taken.append(number))
    read, write = os.pipe()
    os.set_blocking(write, False)
    fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        open_files = len(os.listdir("/proc/self/fd"))
        for _ in range(2):
            signals.listen(lambda message: None, lambda status: None)
            signals.steps_begin()
            assert len(readers()) == 1
            os.kill(os.getpid(), signal.SIGTERM)
            until(signals.requested)
            assert signals.requested() == signal.SIGTERM
            signals.finished()
            signals.restore()
            assert not readers()
            assert (signals.requested(), signals._training, signals._finished) == (0, False, False)
            assert len(os.listdir("/proc/self/fd")) <= open_files  # others of this process may close theirs
        os.kill(os.getpid(), signal.SIGUSR2)
        until(lambda: taken == [signal.SIGUSR2])
        assert os.read(read, 1) == bytes([signal.SIGUSR2])
        assert signal.set_wakeup_fd(write, warn_on_full_buffer=False) == write
    finally:
        signal.signal(signal.SIGUSR2, mine)
        signal.set_wakeup_fd(fd)
        os.close(read)
        os.close(write)
    assert {number: signal.getsignal(number) for number in signals.STOPPING} == before


def test_restore_without_listening_is_nothing():
    """Also in a thread, where Python refuses handlers: a run in a thread never listened."""
    problems = []

    def work():
        try:
            signals.restore()
        except ValueError as error:
            problems.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not problems


def test_listening_twice_keeps_the_first_handlers():
    before = signal.getsignal(signal.SIGTERM)
    signals.listen(lambda message: None, lambda status: None)
    signals.listen(lambda message: None, lambda status: None)
    assert len(readers()) == 1
    signals.restore()
    assert signal.getsignal(signal.SIGTERM) == before

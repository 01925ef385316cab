"""What a process says: what --quiet leaves out, bars at a terminal alone, lines elsewhere, and what of it is kept."""

import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading

import pytest

from cola_ds import notices
from tests.support.toys import REPOSITORY

SPEAK = """
import sys
from cola_ds import notices
notices.BAR_AFTER_S = notices.TELLS_EVERY_S = 0
notices.be_quiet(sys.argv[1] == "quiet")
notices.result("a result"), notices.line("a line"), notices.notice("a notice")
notices.warning("mind"), notices.error("cola-ds: why")
with notices.Progress("reading", "row", 2000) as progress:
    for done in (1, 1000, 2000):
        progress.at(done)
    notices.result("between")
with notices.Progress("loading", "B", 3e9, shown=False) as progress:
    progress.at(1e9)
"""


@pytest.fixture(autouse=True)
def as_before():
    yield
    notices.be_quiet(False)
    notices.end_log()


def spoken(how):
    done = subprocess.run(
        [sys.executable, "-c", SPEAK, how], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr.splitlines()


def test_what_is_said_where_there_is_no_terminal():
    out, err = spoken("aloud")
    assert out == ["a result", "a line", "between"]
    assert err[:3] == ["cola-ds: a notice", "cola-ds: warning: mind", "cola-ds: why"]
    assert err[3:] == [f"cola-ds ... reading: {done} of 2,000 rows after 0 s" for done in ("1", "1,000", "2,000")]


def test_what_quiet_leaves():
    assert spoken("quiet") == (["a result", "between"], ["cola-ds: warning: mind", "cola-ds: why"])


def at_a_terminal(how):
    number, terminal = pty.fork()
    if number == 0:
        os.chdir(REPOSITORY)
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        os.execv(sys.executable, [sys.executable, "-c", SPEAK, how])
    seen = b""
    try:
        while select.select([terminal], [], [], 60)[0] and (got := os.read(terminal, 4096)):
            seen += got
    except OSError:  # it has ended
        pass
    finally:
        os.close(terminal)
        os.waitpid(number, 0)
    return seen.decode()


def test_a_bar_at_a_terminal():
    """Lines stand above it, whole; it is gone at the end."""
    seen = at_a_terminal("aloud")
    assert "\rcola-ds: reading: 100%|" in seen
    assert "after 0 s" not in seen
    assert "loading" not in seen
    lines = [line.rpartition("\r")[2] for line in seen.replace("\r\n", "\n").split("\n")]
    assert lines == ["a result", "a line", "cola-ds: a notice", "cola-ds: warning: mind", "cola-ds: why", "between", ""]


def test_no_bar_at_a_terminal_with_quiet():
    lines = at_a_terminal("quiet").splitlines()
    assert lines == ["a result", "cola-ds: warning: mind", "cola-ds: why", "between"]


def test_what_is_over_soon_has_no_bar_and_no_line(monkeypatch, capsys):
    with notices.Progress("loading", "B", 13e9) as progress:
        progress.at(1e9)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(notices, "TELLS_EVERY_S", 0)
    with notices.Progress("loading", "B", 13e9) as progress:
        progress.at(1e9)
    assert capsys.readouterr() == ("", "cola-ds ... loading: 1.0 of 13.0 GB after 0 s\n")


def test_what_is_said_before_there_is_a_log_comes_first(capsys):
    kept = []
    notices.line("no run's")
    notices.begin_log()
    notices.be_quiet(True)
    notices.line("early")
    notices.keep_in(kept.append)
    notices.notice("late")
    notices.unsaid("raised")
    notices.keep_errors_in(lambda text: kept.append("again"))
    notices.error("cola-ds: why")
    notices.end_log()
    notices.warning("no run's")
    assert kept == ["early", "cola-ds: late", "raised", "cola-ds: why"]
    assert capsys.readouterr() == ("no run's\n", "cola-ds: why\ncola-ds: warning: no run's\n")


def test_errors_alone_where_no_log_is_kept():
    kept = []
    notices.keep_errors_in(kept.append)
    notices.line("a line")
    notices.error("cola-ds: why")
    assert kept == ["cola-ds: why"]


def test_what_transformers_has_a_bar_for(monkeypatch, capsys):
    from transformers.utils import logging

    monkeypatch.setattr(notices, "TELLS_EVERY_S", -1)
    with notices.of_transformers("loading", "weight"):
        assert list(logging.tqdm(["a", "b"], desc="theirs")) == ["a", "b"]
    assert [re.sub(r"\d s", "X s", line) for line in capsys.readouterr().err.splitlines()] == [
        f"cola-ds ... loading: {done} of 2 weights after X s" for done in (0, 1)
    ]
    before = logging.is_progress_bar_enabled()
    with notices.of_transformers("loading", "weight", shown=False):
        assert logging.is_progress_bar_enabled() == before


@pytest.mark.parametrize("error", [OSError("full"), ValueError("closed")])
def test_nothing_that_is_said_fails(monkeypatch, error):
    class Full(io.StringIO):
        def write(self, text):
            raise error

        def isatty(self):
            raise error

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Full())
    monkeypatch.setattr(notices, "TELLS_EVERY_S", -1)
    notices.line("x"), notices.error("x"), notices.result("x")
    with notices.Progress("loading", "B") as progress:
        progress.at(3)


def test_a_log_that_hangs_keeps_no_thread_from_ending_the_process(capsys):
    """What a thread says is shown first, and its log is waited for a moment alone."""
    never = threading.Event()
    notices.begin_log()
    notices.keep_in(lambda text: never.wait() and None)
    thread = threading.Thread(target=notices.error, args=("cola-ds: no progress",), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    never.set()
    assert capsys.readouterr().err == "cola-ds: no progress\n"


def test_without_standard_error(monkeypatch):
    for there in (None, object()):
        monkeypatch.setattr(sys, "stderr", there)
        assert not notices.at_terminal()
    monkeypatch.setattr(sys, "stderr", None)
    notices.error("cola-ds: nobody hears it")
    with notices.Progress("reading", "row") as progress:
        progress.at(1)


def test_the_warnings_of_a_summary_stay_with_quiet(capsys):
    from cola_ds.training.api import tell

    capsys.readouterr()  # what the import says
    notices.be_quiet(True)
    tell("steps       3\nwarning     the loss cannot end a link\nrun folder  x")
    assert capsys.readouterr() == ("", "cola-ds: warning: the loss cannot end a link\n")
    notices.be_quiet(False)
    tell("warning     once")
    assert capsys.readouterr() == ("warning     once\n", "")

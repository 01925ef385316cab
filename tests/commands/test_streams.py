"""What becomes of a command that cannot print: its status says what it has done, and nothing else goes wrong."""

import subprocess
import sys

import pytest

from cola_ds import cli
from tests.support.sweeps import save_base, write_sweep
from tests.support.toys import REPOSITORY

COMMAND = f"exec {sys.executable} -m cola_ds"


def status_and_output(words, redirected):
    done = subprocess.run(
        ["bash", "-c", f"{COMMAND} {words} {redirected}"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("redirected", "status", "said"),
    [
        ("2>/dev/full", 0, ""),
        ("2>&-", 0, ""),
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
        (">/dev/full", 1, "cola-ds: standard output: No space left on device\n"),
        (">/dev/full 2>/dev/full", 1, ""),
    ],
)
def test_a_list_that_cannot_be_printed(tmp_path, redirected, status, said):
    save_base(tmp_path)
    write_sweep(tmp_path)
    found = status_and_output(f"sweep {tmp_path}/sweep.yaml --list", redirected)
    assert (found[0], found[2]) == (status, said)
    assert found[1].startswith("# folder") == redirected.startswith("2")


@pytest.mark.parametrize("redirected", ["2>/dev/full", "2>&-", ">&- 2>&-", ">/dev/full 2>/dev/full"])
@pytest.mark.parametrize("words", ["train none.yaml", "train"])
def test_a_mistake_that_cannot_be_said_is_one_all_the_same(words, redirected):
    assert status_and_output(words, redirected) == (2, "", "")


def test_what_is_closed_is_no_file_of_the_run(tmp_path):
    """The next file that is opened would get the number of a closed stream, and all that is printed there."""
    script = (
        "import os, sys; from cola_ds.commands import streams; streams.harden(); out = open(sys.argv[1], 'w')\n"
        "print('to standard output', flush=True); print('to standard error', file=sys.stderr); os.write(2, b'to number 2')\n"
        "out.write('mine'); out.close(); sys.exit(7)"
    )
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    words = f"{sys.executable} {tmp_path / 'script.py'} {tmp_path / 'file'} >&- 2>&- <&-"
    assert subprocess.run(["bash", "-c", words], cwd=REPOSITORY, timeout=60).returncode == 7
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "cola-ds: interrupted"),
        (MemoryError(), 1, "cola-ds: out of memory (MemoryError; "),
        (
            RecursionError("maximum recursion depth exceeded"),
            1,
            "cola-ds: something that was read is nested too deeply",
        ),
    ],
)
def test_what_reaches_the_command_at_last_is_one_line(monkeypatch, capfd, error, status, said):
    def fail(*args):
        raise error

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # what the command sets is undone
    monkeypatch.setattr("cola_ds.commands.inspect.inspect", fail)
    assert cli.main(["inspect", "x"]) == status
    printed = capfd.readouterr().err
    assert printed.startswith(said)
    assert printed.count("\n") == 1


def test_a_defect_keeps_its_traceback(monkeypatch, capfd):
    def fail(*args):
        raise AssertionError("a defect")

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr("cola_ds.commands.inspect.inspect", fail)
    assert cli.main(["inspect", "x"]) == 1
    assert "Traceback" in capfd.readouterr().err


def test_standard_error_arrives_while_a_library_points_it_elsewhere(tmp_path):
    """As DeepSpeed does for as long as it asks the compiler what it has: what the watchdog says then must not be lost."""
    script = (
        "import os, sys; from cola_ds.commands import streams; streams.harden()\n"
        "kept = os.dup(sys.stderr.fileno()); os.dup2(os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY), sys.stderr.fileno())\n"
        "print('who died', file=sys.stderr); os.write(2, b'theirs'); os.dup2(kept, sys.stderr.fileno())\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "elsewhere")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "who died\n")
    assert (tmp_path / "elsewhere").read_text(encoding="utf-8") == "theirs"

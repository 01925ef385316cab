"""Who may take a run folder's lock: nobody while its holder lives, the next one when it is dead."""

import json
import os
import subprocess
import sys
import time

import pytest

from cola_ds import lock
from cola_ds.errors import UserError
from cola_ds.lock import RunLock


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "runs/run"


def held(folder, **changes):
    """The lock of a run, as another process would have left it."""
    folder.mkdir(parents=True, exist_ok=True)
    mine = RunLock(folder)
    mine.take()
    content = {**json.loads(mine.path.read_bytes()), **changes}
    mine.release()  # or this process, no longer its holder, would end
    folder.mkdir(parents=True, exist_ok=True)
    mine.path.write_text(json.dumps(content), encoding="utf-8")
    return mine.path


def test_taken_and_released(folder):
    mine = RunLock(folder)
    mine.take()
    assert lock.holder(folder)["pid"] == os.getpid()
    with pytest.raises(UserError, match=f"belongs to a run that is still going: process {os.getpid()} on "):
        RunLock(folder).take()
    mine.release()
    assert not folder.parent.exists()  # nothing was written there
    RunLock(folder).take()


def test_a_folder_that_was_there_stays(folder):
    folder.mkdir(parents=True)
    mine = RunLock(folder)
    mine.take()
    mine.release()
    assert folder.is_dir()
    assert not list(folder.iterdir())


def test_a_dead_process_of_this_host(folder):
    dead = subprocess.Popen(["true"])
    dead.wait()
    held(folder, pid=dead.pid)
    assert lock.holder(folder) is None
    RunLock(folder).take()
    assert lock.holder(folder)["pid"] == os.getpid()


def test_another_process_with_its_number(folder):
    """A process number comes again: when it began tells them apart."""
    held(folder, started={**lock._start_of(os.getpid()), "ticks": "17"})
    RunLock(folder).take()


def test_a_process_of_another_host_is_believed_until_it_is_silent(folder):
    path = held(folder, host="elsewhere")
    with pytest.raises(UserError, match=r"on elsewhere, last heard of \d+ s ago"):
        RunLock(folder).take()
    old = time.time() - lock.STALE_AFTER_S - 5
    os.utime(path, (old, old))
    RunLock(folder).take()


def test_an_earlier_start_of_the_same_job(folder, monkeypatch):
    held(folder, host="elsewhere", job="12", restarts="0")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    with pytest.raises(UserError, match=r"\(Slurm job 12\)"):  # another step of the job, at the same time
        RunLock(folder).take()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    RunLock(folder).take()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', '{"host": null, "started": 3}'])
def test_what_is_no_lock_expires(folder, content):
    folder.mkdir(parents=True)
    (folder / lock.NAME).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="still going"):
        RunLock(folder).take()
    old = time.time() - lock.STALE_AFTER_S - 5
    os.utime(folder / lock.NAME, (old, old))
    RunLock(folder).take()


def test_of_many_at_once_one_gets_it(folder):
    """Sixteen processes, over a stale lock."""
    path = held(folder, host="elsewhere")
    old = time.time() - lock.STALE_AFTER_S - 5
    os.utime(path, (old, old))
    script = (
        "import sys, time, pathlib; from cola_ds.lock import RunLock; from cola_ds.errors import UserError\n"
        "try: RunLock(pathlib.Path(sys.argv[1])).take()\n"
        "except UserError: sys.exit(2)\n"
        "time.sleep(5)"
    )
    several = [subprocess.Popen([sys.executable, "-c", script, str(folder)]) for _ in range(16)]
    assert sorted(process.wait() for process in several) == [0] + [2] * 15


def test_a_holder_that_lost_its_lock_ends(folder):
    script = (
        "import sys, time, pathlib; from cola_ds import lock\n"
        "lock.RENEWED_EVERY_S = 0.1\n"
        "lock.RunLock(pathlib.Path(sys.argv[1])).take()\n"
        "print('held', flush=True)\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        held(folder.parent / "another").replace(folder / lock.NAME)
        assert "was taken over by another run: this one ends" in holder.communicate(timeout=30)[1]
    assert holder.returncode == 3

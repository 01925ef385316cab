"""Who may take a run folder's lock: nobody while its holder lives, the next one when it is dead."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from cola_ds.errors import UserError
from cola_ds.run import lock
from cola_ds.run.lock import RunLock


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


THEIRS = {
    "host": socket.gethostname(), "pid": 1, "started": {"ticks": "1", "boot": "2", "pid_namespace": "3"}, "job": None,
    "restarts": "0", "id": "abc",
}  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"3", b"null", b'{"pid": "x"}', b'{"host": null, "started": 3}', b"\xff\xfe", b"\0" * 100,
        b"[" * 100_000, b"9" * 100_000, b"x" * 10**6,
        *(
            json.dumps(THEIRS | changes).encode()
            for changes in (
                {"pid": True}, {"pid": -5}, {"pid": 10**400}, {"pid": "17"}, {"host": 3}, {"host": "h" * 5000}, {"id": None},
                {"started": []}, {"started": {}}, {"started": {"ticks": 1, "boot": 2, "pid_namespace": 3}}, {"job": [1]},
                {"restarts": {"a": 1}},
            )
        ),
    ],
)  # fmt: skip
def test_what_is_no_lock_is_nobodys_to_take(folder, content):
    """However old it is: it may be the user's own file."""
    folder.mkdir(parents=True)
    (folder / lock.NAME).write_bytes(content)
    with pytest.raises(
        UserError, match=r"lock\.json is no lock of a run: no run wrote what is in it; remove it if no run goes on"
    ) as caught:
        RunLock(folder).take()
    assert len(str(caught.value)) < 500
    assert not lock.holder(folder)
    old = time.time() - 10 * lock.STALE_AFTER_S
    os.utime(folder / lock.NAME, (old, old))
    with pytest.raises(UserError, match="is no lock of a run"):
        RunLock(folder).take()
    assert (folder / lock.NAME).read_bytes() == content


@pytest.mark.parametrize("kind", ["folder", "link", "broken link", "pipe"])
def test_what_no_run_puts_in_the_locks_place_stays(folder, kind):
    folder.mkdir(parents=True)
    path = folder / lock.NAME
    (folder / "mine.json").write_text(json.dumps(THEIRS), encoding="utf-8")
    {
        "folder": path.mkdir,
        "link": lambda: path.symlink_to(folder / "mine.json"),
        "broken link": lambda: path.symlink_to(folder / "none"),
        "pipe": lambda: os.mkfifo(path),
    }[kind]()
    with pytest.raises(
        UserError, match=r"lock.json is no lock of a run: it is not a file; remove it if no run goes on"
    ):
        RunLock(folder).take()
    assert lock.holder(folder) is None
    assert path.is_symlink() or path.exists()
    assert sorted(each.name for each in folder.iterdir()) == ["lock.json", "mine.json"]


def test_a_system_that_does_not_say_when_processes_began(folder, monkeypatch):
    """As without Linux's /proc: nobody is thought dead but for his silence."""
    nothing = dict.fromkeys(("ticks", "boot", "pid_namespace"), "")
    monkeypatch.setattr(lock, "Path", lambda name: folder / "none" / str(name).strip("/"))
    assert lock._start_of(os.getpid()) == nothing
    path = held(folder, pid=2**22 + 7)
    assert json.loads(path.read_bytes())["started"] == nothing
    with pytest.raises(UserError, match="belongs to a run that is still going"):
        RunLock(folder).take()
    old = time.time() - lock.STALE_AFTER_S - 5
    os.utime(path, (old, old))
    RunLock(folder).take()


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "file/run"])
def test_a_folder_that_cannot_be_made(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^run\.dir .* cannot be made: ") as caught:
        RunLock(tmp_path / name).take()
    assert len(str(caught.value)) < 400


def test_of_many_at_once_one_gets_it(folder):
    """Sixteen processes, over a stale lock."""
    path = held(folder, host="elsewhere")
    old = time.time() - lock.STALE_AFTER_S - 5
    os.utime(path, (old, old))
    script = (
        "import sys, time, pathlib; from cola_ds.run.lock import RunLock; from cola_ds.errors import UserError\n"
        "try: RunLock(pathlib.Path(sys.argv[1])).take()\n"
        "except UserError: sys.exit(2)\n"
        "time.sleep(5)"
    )
    several = [subprocess.Popen([sys.executable, "-c", script, str(folder)]) for _ in range(16)]
    assert sorted(process.wait() for process in several) == [0] + [2] * 15


def test_a_holder_that_lost_its_lock_ends(folder):
    script = (
        "import os, sys, time, pathlib; from cola_ds.run import lock\n"
        "lock.RENEWED_EVERY_S = 0.1\n"
        "lock.RunLock(pathlib.Path(sys.argv[1])).take(os._exit)\n"
        "print('held', flush=True)\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        held(folder.parent / "another").replace(folder / lock.NAME)
        assert "was taken over by another run: this one ends" in holder.communicate(timeout=30)[1]
    assert holder.returncode == 3

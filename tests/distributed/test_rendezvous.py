"""How processes meet: who dies or fails before that is named at once, who is slow is waited for, strangers do no harm."""

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time

import pytest

from cola_ds.distributed import rendezvous, rendezvous_host, rendezvous_sides
from cola_ds.distributed.launcher import Process, free_port
from cola_ds.errors import ArrivalError, UserError
from tests.support.jobs import Job, at_call
from tests.support.runs import three_links
from tests.support.toys import save_run

HOST = socket.gethostname()


@pytest.fixture
def run_file(toy, tmp_path):
    config = three_links(toy)
    config["run"]["dir"] = str(tmp_path / "run")
    return save_run(tmp_path / "run.yaml", config)


# -- for real ----------------------------------------------------------------------------------------------------------


def mistaken(rank):
    """As where a file is missing on one node."""
    if rank == 1:
        from cola_ds.config import loading

        def load(*args):
            raise UserError("data.train gone.jsonl is not a file")

        loading.load_config = load


def defective(rank):
    if rank == 1:
        from cola_ds.config import loading

        loading.load_config = lambda *args: 1 / 0


def killed_while_loading(rank, victim=1):
    """As by the kernel, where data or a model are larger than the memory."""
    from cola_ds.training import api

    def check(*args):
        wait_until(lambda: rendezvous._current.link if rank else rendezvous._current.peers, within_s=60)
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == victim:
        api.check = check


def killed_when_it_has_arrived(rank):
    """While process 0 has not."""
    at_call(rank, (0,), "cola_ds.distributed.collectives", "prepare_compilation", 1, ("sleep", 4))
    if rank == 1:
        inner = rendezvous_sides.Guest.meet

        def meet(*args):
            threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
            return inner(*args)

        rendezvous_sides.Guest.meet = meet


def process_0_killed(rank):
    killed_while_loading(rank, victim=0)


@pytest.mark.parametrize(
    ("sabotage", "statuses", "message"),
    [
        (
            mistaken,
            [2, 2],
            r"process 1 on HOST \(pid \d+\) ended before all had met: data.train gone.jsonl is not a file",
        ),
        (
            defective,
            [2, 3],
            r"process 1 on HOST \(pid \d+\) ended with status 3 before all had met; see what it printed",
        ),
        (killed_while_loading, [2, -9], r"process 1 on HOST \(pid \d+\) died before all had met"),
        (killed_when_it_has_arrived, [2, -9], r"process 1 on HOST \(pid \d+\) died before all had met"),
        (process_0_killed, [-9, 2], r"process 0 on HOST \(pid \d+\) died before all had met"),
    ],
)
def test_who_ends_before_all_have_met_is_named_at_once(run_file, tmp_path, sabotage, statuses, message):
    begin = time.monotonic()
    with Job(tmp_path / "job", ["train", run_file], sabotage=sabotage) as job:
        assert job.wait(60) == statuses, job.text()
        said = job.text()
    assert time.monotonic() - begin < 40  # of which a few seconds after the fault
    named = re.findall(rf"^cola-ds: {message.replace('HOST', re.escape(HOST))}$", said, re.MULTILINE)
    assert len(named) == 1, said
    assert said.count("cola-ds: ") == 1, said
    assert not (tmp_path / "run").exists()


# -- in one process ----------------------------------------------------------------------------------------------------


@pytest.fixture
def meeting(monkeypatch):
    """Sides of a meeting of so many, all in this process, and what each was ended with. Afterwards none goes on asking at a port
    that is another test's by then."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setattr(rendezvous_sides, "_ACTS_AFTER_S", 0.3)
    monkeypatch.setattr(rendezvous_sides, "REMINDS_EVERY_S", 0.5)
    ended, sides = {}, []

    def side(rank, world_size):
        process = Process(rank, rank, world_size)
        kind = rendezvous_sides.Guest if rank else rendezvous_host.Host
        sides.append(kind(process, lambda status: ended.update({rank: status})))
        return sides[-1]

    yield side, ended
    for each in sides:
        each.stop()


def meet(side, wait_s=10.0, after_s=0.0):
    """In a thread: what it returns or raises."""
    found = []

    def work():
        time.sleep(after_s)
        try:
            found.append(side.meet(wait_s, lambda timeout_s: f"store of {side.rank}"))
        except (UserError, rendezvous_sides.UnreachableError) as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, found


def all_meet(*meetings):
    for thread, _ in meetings:
        thread.join(20)
    return [found[0] for _, found in meetings]


def test_who_is_slow_is_waited_for(meeting, capsys):
    """One that has begun, and one that has not; a line says so while it lasts. Whatever ends later is no matter of arrival."""
    side, ended = meeting
    host, quick = side(0, 3), side(1, 3)
    wait_until(lambda: host.peers)
    first = [meet(host), meet(quick, after_s=4)]
    said = []
    wait_until(lambda: said.append(capsys.readouterr().err) or any(said))
    late = side(2, 3)
    assert all_meet(*first, meet(late, after_s=1.5)) == ["store of 0", "store of 1", "store of 2"]
    said = ("".join(said) + capsys.readouterr().err).splitlines()
    assert f"still loading: process 1 on {HOST} (pid {os.getpid()}); not begun: process 2" in said[0]
    assert all(re.match(r"cola-ds: process 0 has waited \d+ s for the others; ", line) for line in said)
    for each in (quick, host, late):
        each.leave(3)
    time.sleep(0.5)
    assert not ended
    assert not capsys.readouterr().err


def test_who_never_begins(meeting):
    side, _ = meeting
    sides = side(0, 3), side(1, 3)
    wait_until(lambda: sides[0].peers)
    host, guest = meet(sides[0], 1.5), meet(sides[1])
    found = all_meet(host, guest)
    assert isinstance(found[0], ArrivalError)
    assert str(found[0]).startswith(f"process 2 did not arrive within 1.5 s; 2 of 3 did, from {HOST}; look at")
    assert type(found[1]) is UserError
    assert str(found[1]) == str(found[0])


def test_a_loss_ends_those_who_still_load(meeting, capsys):
    """Process 0 says it, all end."""
    side, ended = meeting
    sides = [side(rank, 3) for rank in range(3)]
    wait_until(lambda: len(sides[0].peers) == 2)
    sides[1].leave(2)
    sides[1].send({"said": "cola-ds: no\nsuch file"})
    wait_until(lambda: ended.keys() == {0, 2})
    assert set(ended.values()) == {2}
    said = f"cola-ds: process 1 on {HOST} (pid {os.getpid()}) ended before all had met: no such file\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("who", [0, 1])
def test_a_connection_that_ends_without_a_word(meeting, capsys, who):
    """As the kernel ends that of a process that was killed: whoever waits is told, also of process 0."""
    side, _ = meeting
    host, guest = side(0, 2), side(1, 2)
    wait_until(lambda: host.peers and guest.link)
    met = meet(guest if who == 0 else host)
    wait_until(lambda: (guest if who == 0 else host).in_meeting)
    (host if who == 0 else guest).over = True  # a killed process says nothing any more
    (host.peers[1].link if who == 0 else guest.link).shutdown(socket.SHUT_RDWR)
    died = f"process {who} on {HOST} (pid {os.getpid()}) died before all had met"
    assert str(all_meet(met)[0]) == died
    assert capsys.readouterr().err.count(f"cola-ds: {died}\n") == 1 - who


def test_last_words_wait_for_process_0(meeting):
    side, _ = meeting
    guest = side(1, 2)
    guest.leave(2)
    guest.send({"said": "gone"})
    (found,) = all_meet(meet(side(0, 2)))
    assert str(found).endswith("ended before all had met: gone")


def test_process_0_ends_first(meeting, capsys):
    """It has said why: the others are silent."""
    side, ended = meeting
    host, guest, waiting = side(0, 3), side(1, 3), side(2, 3)
    met = meet(waiting)
    wait_until(lambda: len(host.peers) == 2)
    host.leave(2)
    wait_until(lambda: ended == {1: 2})
    assert str(all_meet(met)[0]) == f"process 0 on {HOST} (pid {os.getpid()}) ended with status 2 before all had met"
    assert guest.host_left
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "hello",
    [b"", b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"{}\n", b'{"rank": 1}\n', b"[" * 60_000 + b"\n", b"\xff\n", b"9" * 60_000 + b"\n",
     {"rank": 1, "world_size": 3}, {"rank": 0, "world_size": 2}, {"rank": 9, "world_size": 2}, {"rank": "x", "world_size": 2}],
)  # fmt: skip
def test_strangers_do_no_harm(meeting, capsys, hello):
    """Nor do processes of another run, which the port leads here; nor a second one of the same number."""
    side, ended = meeting
    host = side(0, 2)
    text = hello if isinstance(hello, bytes) else json.dumps({**hello, "host": "h", "pid": 1}).encode() + b"\n"
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", int(os.environ["MASTER_PORT"]))) as stranger:
            stranger.sendall(text)
    assert all_meet(meet(host), meet(side(1, 2))) == ["store of 0", "store of 1"]
    assert not ended
    assert not capsys.readouterr().err


def test_strangers_are_let_go(meeting):
    """One that says too much at once, one that says nothing for so long: neither stays connected. Who has said who
    it is may be silent for longer."""
    side, _ = meeting
    host, guest = side(0, 2), side(1, 2)
    wait_until(lambda: host.peers)
    for text, within_s in ((b"x" * 2**17, 1.5), (b"", 4.5)):
        with socket.create_connection(("127.0.0.1", int(os.environ["MASTER_PORT"])), timeout=6) as stranger:
            begun = time.monotonic()
            with contextlib.suppress(OSError):
                stranger.sendall(text)
            with contextlib.suppress(ConnectionError):
                assert stranger.recv(1) == b""
            assert time.monotonic() - begun < within_s
    assert all_meet(meet(host), meet(guest)) == ["store of 0", "store of 1"]


def test_process_0_listens_in_one_thread(meeting):
    """And when all have met and gone on, in none, with none of the connections left."""
    side, _ = meeting
    host, guests = side(0, 9), [side(rank, 9) for rank in range(1, 9)]
    wait_until(lambda: len(host.peers) == 8)
    assert [thread.is_alive() for thread in host.threads] == [True]
    assert all_meet(*(meet(each) for each in (host, *guests))) == [f"store of {rank}" for rank in range(9)]
    wait_until(lambda: not host.threads[0].is_alive())
    assert {link.fileno() for link in (host.server, *host.connections())} == {-1}


def test_a_second_process_of_the_same_number(meeting):
    side, ended = meeting
    host, first = side(0, 2), side(1, 2)
    wait_until(lambda: host.peers)
    second = meet(side(1, 2), 0.5)
    assert str(all_meet(second)[0]) == "somebody is there, but it is not process 0 of this run"
    assert all_meet(meet(host), meet(first)) == ["store of 0", "store of 1"]
    assert not ended


def test_who_meets_a_stranger(meeting):
    """Something else listens at the port, and answers nonsense."""
    side, _ = meeting
    with socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))) as server:
        threading.Thread(target=lambda: server.accept()[0].sendall(b"SSH-2.0\r\n"), daemon=True).start()
        host = side(0, 2)
        assert "Address already in use; set another MASTER_PORT" in str(all_meet(meet(host))[0])
        (found,) = all_meet(meet(side(1, 2), 0.5))
    assert isinstance(found, rendezvous_sides.UnreachableError)
    assert str(found) == "somebody is there, but it is not process 0 of this run"


def wait_until(true, within_s=10):
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)

"""Two runs in one process, as in a notebook: nothing of the first is left when the second begins."""

import os
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from cola_ds.distributed import collectives, launcher, rendezvous, watchdog
from cola_ds.distributed.launcher import Process, free_port
from tests.support.distributed import run_distributed

_earlier = set()


@pytest.fixture(autouse=True)
def earlier_threads():
    """Those of other tests of this process, which never end their meetings."""
    _earlier.update(threading.enumerate())


def own_threads():
    alive = set(threading.enumerate()) - _earlier
    return [thread.name for thread in alive if thread.name in ("watch", "rendezvous", "signals")]


def sockets():
    """How many this process has open: listening, connected, or closed by the other side."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).startswith("socket:") for link in links if os.path.islink(link))


def group_of(process, port, endings):
    """A group as the command has one: met, watched, used, left. Returns a sum over all processes, and who they are."""
    os.environ["MASTER_PORT"] = str(port)
    rendezvous.begin(process, endings.append)
    collectives.init_process_group(
        process,
        begin_watch=lambda share: watchdog.begin(process, 60.0, endings.append, share),
    )
    watchdog.heartbeat("examples", step=1)
    total = collectives.all_reduce_sum(torch.tensor([1.0 + process.rank], device=collectives.device()))
    said = collectives.all_gather_objects({"rank": process.rank, "port": port})
    time.sleep(1.5)  # the watch talks every second
    assert watchdog.begun()
    watchdog.leave(0)
    collectives.destroy_process_group()
    watchdog.stop()
    rendezvous.stop()
    return [float(total.item()), *(answer["rank"] for answer in said), said[0]["port"] == port]


def twice(process, *ports):
    endings, sums, left = [], [], []
    for port in ports:
        sums.append(group_of(process, port, endings))
        left.append(sockets())
        assert not own_threads()
        assert not watchdog.begun()
        assert (watchdog._beats, watchdog._step, watchdog._doing, watchdog._armed) == (0, 0, "starting", False)
        assert rendezvous._current is None
    time.sleep(1)
    assert not endings
    assert left[-1] == left[0], left
    return sums


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_group_after_a_group(world_size):
    ports = [free_port() for _ in range(3)]
    total, ranks = world_size * (world_size + 1) / 2, list(range(world_size))
    assert run_distributed(twice, world_size, *ports) == [[[total, *ranks, True]] * 3] * world_size


def refused(process, *ports):
    """A run that ends before all have met, then one that goes well."""
    endings = []
    os.environ["MASTER_PORT"] = str(ports[0])
    rendezvous.begin(process, endings.append)
    if process.rank == 1:
        rendezvous.leave(2)
    else:
        with pytest.raises(Exception, match=r"process 1 on .* ended with status 2 before all had met"):
            collectives.init_process_group(process)
    rendezvous.stop()
    assert not own_threads()
    return group_of(process, ports[1], endings)


def test_a_group_after_one_that_never_met():
    ports = [free_port() for _ in range(2)]
    assert run_distributed(refused, 2, *ports) == [[3.0, 0, 1, True]] * 2


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    yield
    rendezvous.stop()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_meeting_is_forgotten_before_anybody_came(alone, rank):
    before = sockets()
    for _ in range(2):  # a port that the first one kept could not be taken again
        rendezvous.begin(Process(rank, 0, 2), lambda status: None)
        assert getattr(rendezvous._current, "problem", None) is None
        time.sleep(0.3)
        rendezvous.stop()
        assert not own_threads()
    assert sockets() <= before  # those of earlier tests may go


def test_a_meeting_with_somebody_who_says_nothing_is_forgotten(alone):
    """Something else listens at the port, and never answers."""
    with socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))) as server:
        rendezvous.begin(Process(1, 0, 2), lambda status: None)
        link, _ = server.accept()
        time.sleep(0.2)
        begin = time.monotonic()
        rendezvous.stop()
        assert time.monotonic() - begin < 2
        assert not own_threads()
        link.close()


def test_a_watch_ends_while_it_waits_for_others(monkeypatch):
    """Process 0's, of two of which the other never joined."""
    before, endings = sockets(), []
    watchdog.begin(Process(0, 0, 2), 60.0, endings.append, lambda offer: offer)
    watchdog.heartbeat("a step", step=7)
    time.sleep(0.2)
    begin = time.monotonic()
    watchdog.leave(2)
    watchdog.stop()
    assert time.monotonic() - begin < 2
    assert not own_threads()
    assert sockets() <= before  # those of earlier tests may go
    assert not endings
    assert SimpleNamespace(beats=watchdog._beats, step=watchdog._step) == SimpleNamespace(beats=0, step=0)


def test_the_variables_of_a_lone_run_are_put_back(monkeypatch):
    for name in launcher._CHANGED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_PORT", "1234")  # as may linger in a shell
    before = dict(os.environ)
    ports = []
    for _ in range(2):
        with launcher.environment():
            assert launcher.identify() == Process(0, 0, 1)
            ports.append(os.environ["MASTER_PORT"])
            os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = "0"
        assert dict(os.environ) == before
    assert ports == ["1234", "1234"]
    with pytest.raises(ZeroDivisionError), launcher.environment():
        launcher.identify()
        1 / 0  # noqa: B018
    assert dict(os.environ) == before


@pytest.mark.parametrize(("rank", "local_rank", "speaks"), [(0, 0, True), (1, 1, True), (4, 0, True), (5, 1, False)])
def test_one_process_of_a_node_says_why(monkeypatch, capsys, rank, local_rank, speaks):
    """Also where each sees one accelerator, whose number is 0."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    statuses = []
    watch = watchdog.Watch(Process(rank, local_rank, 8), None, statuses.append)
    watch._die("process 2 has gone", [])
    assert statuses == [3] and ("process 2 has gone" in capsys.readouterr().err) == speaks

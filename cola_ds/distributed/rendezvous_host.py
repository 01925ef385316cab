"""Process 0's side of a rendezvous: it listens to all the others, in one thread however many there are."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cola_ds import notices
from cola_ds.distributed import rendezvous_sides as sides
from cola_ds.distributed.launcher import Process, allow_open_files, slurm_nodes
from cola_ds.distributed.rendezvous_sides import GRACE_S, LINE_BYTES, NO_MESSAGE, TRIES_EVERY_S, port_taken, send
from cola_ds.errors import ArrivalError, UserError, first_line, some_of

_SAYS_WHY_S = 1.0  # between the end of a process and its last words


@dataclass(kw_only=True)
class _Peer:
    """What process 0 knows of another."""

    rank: int
    host: str
    pid: int
    link: socket.socket
    arrived: bool = False

    def __str__(self) -> str:
        return f"process {self.rank} on {self.host} (pid {self.pid})"


@dataclass(eq=False)
class _Incoming:
    """A connection, and what has come through it that is not a whole message yet."""

    link: socket.socket
    peer: _Peer | None = None
    """Who is at its other end; None: it has not said so yet."""
    held: bytes = b""
    status: int | None = None
    """What it has said that it ends with."""
    until: float = field(default_factory=lambda: time.monotonic() + GRACE_S)
    """How long it is waited for: for a greeting, or for last words."""


class Host(sides.Side):
    """Process 0: listens to all the others."""

    def __init__(self, process: Process, end: Callable[[int], None]):
        super().__init__(process, end)
        self.peers: dict[int, _Peer] = {}
        self.server: socket.socket | None = None
        self.problem = allow_open_files(process.world_size)
        if self.problem:
            return
        port, both = int(os.environ["MASTER_PORT"]), socket.has_dualstack_ipv6()
        try:
            family = socket.AF_INET6 if both else socket.AF_INET
            self.server = socket.create_server(("", port), family=family, backlog=4096, dualstack_ipv6=both)
        except OSError as error:
            self.problem = port_taken(port, error)
            return
        except OverflowError:
            self.problem = UserError(f"MASTER_PORT {port} is no port; set one between 1 and 65535")
            return
        self.server.setblocking(False)  # whoever is announced may have gone again
        self.full = False
        """All have arrived: nobody else is to connect."""
        self.closed = threading.Event()
        """The port is free again."""
        self.wakes, self.waker = socket.socketpair()
        self.thread(self.listen, self.server)

    def listen(self, server: socket.socket) -> None:
        """Take whoever connects, until all have arrived, and what they say, until all are gone or this process stops."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.wakes, selectors.EVENT_READ)
            selector.register(server, selectors.EVENT_READ)
            there: set[_Incoming] = set()
            looked = time.monotonic()
            while not (self.stopped.is_set() or (self.closed.is_set() and self.over and not there)):
                gone = []
                for key, _ in selector.select(TRIES_EVERY_S):
                    if key.fileobj is self.wakes:
                        self.wakes.recv(64)
                    elif key.fileobj is server:
                        with contextlib.suppress(OSError):
                            link, _ = server.accept()
                            there.add(new := _Incoming(link))
                            selector.register(link, selectors.EVENT_READ, new)
                    elif not self.take(key.data):
                        gone.append(key.data)
                if time.monotonic() - looked > TRIES_EVERY_S:  # not at each message: there may be many
                    looked = time.monotonic()
                    gone += [each for each in there if each.until < looked and each not in gone]
                for each in gone:
                    there.remove(each)
                    selector.unregister(each.link)
                    self.lose(each)
                if self.full and not self.closed.is_set():
                    selector.unregister(server)
                    server.close()
                    self.closed.set()
        server.close()
        self.closed.set()

    def take(self, each: _Incoming) -> bool:
        """Take what has come through a connection; whether there may be more."""
        with contextlib.suppress(*NO_MESSAGE):
            came = each.link.recv(2**16)
            *lines, each.held = (each.held + came).split(b"\n")
            for line in lines:
                self.hear(each, json.loads(line))
            return bool(came) and len(each.held) < LINE_BYTES
        return False

    def hear(self, each: _Incoming, said: dict[str, Any]) -> None:
        """Take a message. Raises one of NO_MESSAGE where it is none."""
        if each.peer is None:
            each.peer = self.greet(each.link, said)
            each.until = math.inf
        elif "arrived" in said:
            with self.changed:
                each.peer.arrived = True
                self.changed.notify_all()
        elif "ended" in said:
            each.status, each.until = said["ended"], time.monotonic() + _SAYS_WHY_S
        elif "said" in said:
            why = re.sub(r"\s+", " ", str(said["said"]))[:1000].removeprefix("cola-ds: ")
            self.give_up(f"{each.peer} ended before all had met: {why}")

    def greet(self, link: socket.socket, hello: dict[str, Any]) -> _Peer:
        """Who has connected. Raises ValueError for a stranger, or a process of another run."""
        peer = _Peer(rank=int(hello["rank"]), host=str(hello["host"]), pid=int(hello["pid"]), link=link)
        known = hello["world_size"] == self.world_size and 0 < peer.rank < self.world_size
        with self.changed:
            if not known or peer.rank in self.peers or self.stopped.is_set():
                raise ValueError
            self.peers[peer.rank] = peer
        send(link, {"welcome": self.host, "pid": os.getpid()})
        return peer

    def lose(self, each: _Incoming) -> None:
        """A connection is over: it has ended, or what it was waited for has not come."""
        each.link.close()
        if each.peer is not None and each.status is None:
            self.give_up(f"{each.peer} died before all had met")
        elif each.peer is not None:
            self.give_up(f"{each.peer} ended with status {each.status} before all had met; see what it printed")

    def give_up(self, verdict: str) -> None:
        """They will not meet. What that takes takes a while: this thread goes on."""
        if self.settle(verdict):
            self.thread(self.act, True)

    def stop(self) -> None:
        self.stopped.set()
        if self.server is None:
            return
        self.waker.send(b"\0")
        super().stop()
        self.wakes.close()
        self.waker.close()

    def meet(self, wait_s: float, open_store: Callable[[float], Any]) -> Any:
        """See `rendezvous.meet`."""
        self.in_meeting = True
        if self.problem:
            raise self.problem
        why = self.wait(wait_s)
        self.full = True
        self.waker.send(b"\0")
        self.closed.wait(GRACE_S)
        store = None
        if not why:
            try:
                store = open_store(wait_s + 2 * GRACE_S)  # before the others look for it
            except RuntimeError as error:
                why = f"process 0 on {self.host} cannot open its store at MASTER_PORT: {first_line(error)}"
        with self.changed:
            self.verdict = why or self.verdict
            self.over = True
        if self.verdict:
            self.tell_verdict()
            raise ArrivalError(self.verdict)
        self.tell({"go": True})
        return store

    def wait(self, wait_s: float) -> str:
        """Until all have arrived; what is to be said if they have not."""
        begun = time.monotonic()
        deadline, reminder = begun + wait_s, begun + sides.REMINDS_EVERY_S
        with self.changed:
            while not self.verdict:
                missing = [r for r in range(1, self.world_size) if not (r in self.peers and self.peers[r].arrived)]
                now = time.monotonic()
                if not missing:
                    return ""
                if now >= deadline:
                    return self.absent(missing, wait_s)
                if now >= reminder:
                    reminder += sides.REMINDS_EVERY_S
                    self.remind(missing, now - begun)
                self.changed.wait(min(deadline, reminder) - now)
            return self.verdict

    def remind(self, missing: list[int], waited_s: float) -> None:
        """One line while it waits."""
        loading = [str(self.peers[rank]) for rank in missing if rank in self.peers]
        unknown = [f"process {rank}" for rank in missing if rank not in self.peers]
        parts = [f"still loading: {some_of(loading)}"] * bool(loading) + [f"not begun: {some_of(unknown)}"] * bool(
            unknown
        )
        notices.notice(f"process 0 has waited {waited_s:.0f} s for the others; {'; '.join(parts)}")

    def absent(self, missing: list[int], wait_s: float) -> str:
        """What is to be said of those who have not arrived in time."""
        names = [str(rank) for rank in missing]
        hosts = sorted({self.host, *(peer.host for rank, peer in self.peers.items() if rank not in missing)})
        arrived = [host.partition(".")[0] for host in hosts]
        nodes = slurm_nodes(os.environ.get("SLURM_STEP_NODELIST", ""))
        empty = [node for node in nodes if node.partition(".")[0] not in arrived]
        return (
            f"process{'es' if len(missing) > 1 else ''} {some_of(names)} did not arrive within {wait_s:g} s"
            + (f" (none from {some_of(empty)})" if empty else "")
            + f"; {self.world_size - len(missing)} of {self.world_size} did, from {some_of(hosts)}; look at what the others "
            f"printed, and whether their hosts reach {os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}"
        )

    def tell(self, message: dict[str, Any]) -> None:
        for peer in list(self.peers.values()):
            with contextlib.suppress(OSError):
                send(peer.link, message)

    def tell_verdict(self) -> None:
        self.tell({"verdict": self.verdict})

    def connections(self) -> list[socket.socket]:
        return [peer.link for peer in self.peers.values()]

    def leave(self, status: int) -> None:
        with self.changed:
            met, self.over = self.over and not self.verdict, True
        if not met:
            self.tell({"ended": status})

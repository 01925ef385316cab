"""The two sides of a rendezvous: process 0 listens to all the others, and each of the others talks to process 0."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cola_ds.distributed.launcher import Process, allow_open_files, slurm_nodes
from cola_ds.errors import ArrivalError, UserError, first_line, some_of

_GRACE_S = 3.0  # for an answer of a process that is there
_SAYS_WHY_S = 1.0  # between the end of a process and its last words
_ACTS_AFTER_S = 5.0  # while a process still loads: it may be about to end by itself, over the same mistake
_REMINDS_EVERY_S = 30.0
_LINE_BYTES = 2**16
_NO_MESSAGE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    OverflowError,
    RecursionError,
)  # what a stranger's bytes may raise
_TRIES_EVERY_S = 0.2


def shut(link: socket.socket) -> None:
    """Close a socket, also under a thread that waits at it."""
    with contextlib.suppress(OSError):  # it is closed already, or nobody is at its other end
        link.shutdown(socket.SHUT_RDWR)  # a close alone would leave the thread there, and the port with it
    link.close()


def port_taken(port: int, error: OSError) -> UserError:
    """What is to be said of a port that process 0 cannot listen at."""
    reason = os.strerror(error.errno) if error.errno else str(error)  # create_server says more than that
    return UserError(f"MASTER_PORT {port} on {socket.gethostname()}: {reason}; set another MASTER_PORT")


class UnreachableError(Exception):
    """Process 0 cannot be reached; why."""


class _Side:
    """What process 0 and the others have in common."""

    def __init__(self, process: Process, end: Callable[[int], None]):
        self.rank, self.world_size, self.end = process.rank, process.world_size, end
        self.speaks = process.rank <= 1 or process.local_rank == 0
        self.host = socket.gethostname()
        self.changed = threading.Condition()
        self.over = False
        """All have met, or this process ends: whatever happens now to a connection means nothing."""
        self.verdict = ""
        """Why they will not meet."""
        self.in_meeting = False
        self.stopped = threading.Event()
        self.threads: list[threading.Thread] = []

    def thread(self, target: Callable[..., None], *args: Any) -> threading.Thread:
        thread = threading.Thread(target=target, args=args, name="rendezvous", daemon=True)
        self.threads.append(thread)
        thread.start()
        return thread

    def decide(self, verdict: str, speak: bool) -> None:
        """They will not meet. If this process waits for that, it is told; one that loads for long yet is ended."""
        with self.changed:
            if self.over or self.verdict:
                return
            self.verdict = verdict
            self.changed.notify_all()
        self.stopped.wait(_ACTS_AFTER_S)
        if not self.over and not self.in_meeting:
            self.over = True
            with contextlib.suppress(OSError, ValueError):
                if speak:
                    print(f"cola-ds: {verdict}", file=sys.stderr, flush=True)
            self.tell_verdict()
            self.end(2)

    def stop(self) -> None:
        """End every thread and close every connection."""
        with self.changed:
            self.over = True
        self.stopped.set()
        while self.threads:  # some may begin others until they end
            with self.changed:
                connections = self.connections()
            for link in connections:
                shut(link)
            self.threads.pop(0).join()

    def connections(self) -> list[socket.socket]:
        """All that are open, or were."""
        return []

    def tell_verdict(self) -> None:
        """Process 0 alone has somebody to tell."""


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


class Host(_Side):
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
        self.accepting = self.thread(self.accept, self.server)

    def accept(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                link, _ = server.accept()
                self.thread(self.hear, link)

    def hear(self, link: socket.socket) -> None:
        """Take what a process says, until its connection ends."""
        peer, status = None, None
        with contextlib.suppress(*_NO_MESSAGE), link.makefile("rb") as lines:
            peer = self.greet(link, lines)
            while peer and (line := lines.readline(_LINE_BYTES)):
                said = json.loads(line)
                if "arrived" in said:
                    with self.changed:
                        peer.arrived = True
                        self.changed.notify_all()
                elif "ended" in said:
                    status = said["ended"]
                    link.settimeout(_SAYS_WHY_S)
                elif "said" in said:
                    why = re.sub(r"\s+", " ", str(said["said"]))[:1000].removeprefix("cola-ds: ")
                    self.decide(f"{peer} ended before all had met: {why}", speak=True)
        if peer is None:
            link.close()
        elif status is None:
            self.decide(f"{peer} died before all had met", speak=True)
        else:
            self.decide(f"{peer} ended with status {status} before all had met; see what it printed", speak=True)

    def greet(self, link: socket.socket, lines: Any) -> _Peer | None:
        """Who has connected; None for a stranger, or a process of another run."""
        link.settimeout(_GRACE_S)
        try:
            hello = json.loads(lines.readline(_LINE_BYTES))
            peer = _Peer(rank=int(hello["rank"]), host=str(hello["host"]), pid=int(hello["pid"]), link=link)
            known = hello["world_size"] == self.world_size and 0 < peer.rank < self.world_size
        except _NO_MESSAGE:
            return None
        with self.changed:
            if not known or peer.rank in self.peers or self.stopped.is_set():
                return None
            self.peers[peer.rank] = peer
        link.settimeout(None)
        _send(link, {"welcome": self.host, "pid": os.getpid()})
        return peer

    def meet(self, wait_s: float, open_store: Callable[[float], Any]) -> Any:
        """See `rendezvous.meet`."""
        self.in_meeting = True
        if self.problem:
            raise self.problem
        why = self.wait(wait_s)
        assert self.server is not None
        shut(self.server)
        self.accepting.join(_GRACE_S)
        store = None
        if not why:
            try:
                store = open_store(wait_s + 2 * _GRACE_S)  # before the others look for it
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
        deadline, reminder = begun + wait_s, begun + _REMINDS_EVERY_S
        with self.changed:
            while not self.verdict:
                missing = [r for r in range(1, self.world_size) if not (r in self.peers and self.peers[r].arrived)]
                now = time.monotonic()
                if not missing:
                    return ""
                if now >= deadline:
                    return self.absent(missing, wait_s)
                if now >= reminder:
                    reminder += _REMINDS_EVERY_S
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
        with contextlib.suppress(OSError, ValueError):
            line = f"cola-ds: process 0 has waited {waited_s:.0f} s for the others; {'; '.join(parts)}"
            print(line, file=sys.stderr, flush=True)

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
                _send(peer.link, message)

    def tell_verdict(self) -> None:
        self.tell({"verdict": self.verdict})

    def connections(self) -> list[socket.socket]:
        return [peer.link for peer in self.peers.values()] + ([self.server] if self.server else [])

    def leave(self, status: int) -> None:
        with self.changed:
            met, self.over = self.over and not self.verdict, True
        if not met:
            self.tell({"ended": status})


class Guest(_Side):
    """Every other process: talks to process 0."""

    def __init__(self, process: Process, end: Callable[[int], None]):
        super().__init__(process, end)
        self.connection: socket.socket | None = None
        """To whoever listens there."""
        self.link: socket.socket | None = None
        """The same, once it is known to be process 0."""
        self.ready = False
        """All have arrived, and the store is open."""
        self.host_left = self.died_silently = False
        self.reason = "no answer"
        """Why process 0 cannot be reached."""
        self.unsent: list[dict[str, Any]] = []
        self.thread(self.talk)

    def talk(self) -> None:
        """Connect, however long that takes, and take what process 0 says."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        hello = {"rank": self.rank, "world_size": self.world_size, "host": self.host, "pid": os.getpid()}
        while not (self.ready or self.stopped.is_set()):
            try:
                with socket.create_connection((address, port), timeout=_GRACE_S) as link:
                    link.settimeout(None)
                    with self.changed:
                        self.connection = link
                    if self.stopped.is_set():
                        return
                    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    self.reason = "somebody is there, but it is not process 0 of this run"
                    _send(link, hello)
                    with link.makefile("rb") as lines:
                        if line := lines.readline(_LINE_BYTES):
                            self.hear(link, lines, json.loads(line))
                            return
            except OSError as error:
                self.reason = error.strerror or str(error)
            except _NO_MESSAGE:
                pass
            self.stopped.wait(_TRIES_EVERY_S)

    def hear(self, link: socket.socket, lines: Any, welcome: dict[str, Any]) -> None:
        """Take what process 0 says, until the meeting is over or its connection ends."""
        host = f"process 0 on {welcome['welcome']} (pid {welcome['pid']})"
        with self.changed:
            self.link = link
            for message in self.unsent:
                _send(link, message)
            self.changed.notify_all()
        status = None
        with contextlib.suppress(*_NO_MESSAGE):
            while line := lines.readline(_LINE_BYTES):
                said = json.loads(line)
                if "go" in said:
                    with self.changed:
                        self.ready = self.over = True
                        self.changed.notify_all()
                    return
                if "verdict" in said:
                    self.thread(self.decide, said["verdict"], False)  # process 0 has said it
                if "ended" in said:
                    status, self.host_left = said["ended"], True
                    self.thread(self.decide, f"{host} ended with status {status} before all had met", False)
        if status is None and not self.over and not self.verdict:
            self.host_left, self.died_silently = True, self.speaks
            self.decide(f"{host} died before all had met", speak=self.speaks)
        self.host_left = True

    def send(self, message: dict[str, Any]) -> None:
        """Now or, where process 0 is not there yet, as soon as it is."""
        with self.changed:
            if self.ready:
                return
            if self.link is None:
                self.unsent.append(message)
                return
            with contextlib.suppress(OSError):
                _send(self.link, message)

    def meet(self, wait_s: float, open_store: Callable[[float], Any]) -> Any:
        """See `rendezvous.meet`."""
        self.send({"arrived": True})
        deadline = time.monotonic() + wait_s
        with self.changed:
            self.in_meeting = True
            while not (self.link or self.verdict) and time.monotonic() < deadline:
                left_s = deadline - time.monotonic()
                if not self.changed.wait_for(lambda: self.link or self.verdict, min(left_s, _REMINDS_EVERY_S)):
                    self.remind()
            if self.link is None and not self.verdict:
                raise UnreachableError(self.reason)
            self.changed.wait_for(lambda: self.ready or self.verdict, deadline + 2 * _GRACE_S - time.monotonic())
            if self.verdict:
                if self.died_silently:  # nobody else says so
                    print(f"cola-ds: {self.verdict}", file=sys.stderr, flush=True)
                raise UserError(self.verdict)
            if not self.ready:
                raise UnreachableError("it was reached, but has not arrived itself")
        try:
            return open_store(wait_s + 2 * _GRACE_S)
        except RuntimeError as error:
            raise UnreachableError(first_line(error)) from None

    def remind(self) -> None:
        """One line while it waits for somebody to listen, from one process of each machine."""
        if self.speaks:
            where = f"{os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}"
            with contextlib.suppress(OSError, ValueError):
                line = f"cola-ds: process {self.rank} on {self.host} does not reach process 0 at {where} yet: {self.reason}"
                print(line, file=sys.stderr, flush=True)

    def leave(self, status: int) -> None:
        self.send({"ended": status})
        self.over = True

    def stop(self) -> None:
        with self.changed:
            if self.unsent:  # process 0 would wait for what it was never told
                self.changed.wait_for(lambda: self.link, _GRACE_S)
        super().stop()

    def connections(self) -> list[socket.socket]:
        return [self.connection] if self.connection else []


def _send(link: socket.socket, message: dict[str, Any]) -> None:
    link.sendall(json.dumps(message).encode() + b"\n")

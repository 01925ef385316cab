"""What the two sides of a rendezvous have in common, and the side of those who talk to process 0."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from cola_ds import notices
from cola_ds.distributed.launcher import Process
from cola_ds.errors import UserError, first_line

GRACE_S = 3.0  # for an answer of a process that is there
_ACTS_AFTER_S = 5.0  # while a process still loads: it may be about to end by itself, over the same mistake
REMINDS_EVERY_S = 30.0
LINE_BYTES = 2**16
NO_MESSAGE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    OverflowError,
    RecursionError,
)  # what a stranger's bytes may raise
TRIES_EVERY_S = 0.2


def shut(link: socket.socket) -> None:
    """Close a socket, also under a thread that waits at it."""
    with contextlib.suppress(OSError):  # it is closed already, or nobody is at its other end
        link.shutdown(socket.SHUT_RDWR)  # a close alone would leave the thread there, and the port with it
    link.close()


def port_taken(port: int, error: OSError) -> UserError:
    """What is to be said of a port that process 0 cannot listen at."""
    reason = os.strerror(error.errno) if error.errno else str(error)  # create_server says more than that
    return UserError(f"MASTER_PORT {port} on {socket.gethostname()}: {reason}; set another MASTER_PORT")


def send(link: socket.socket, message: dict[str, Any]) -> None:
    """Say a message, which is one line."""
    link.sendall(json.dumps(message).encode() + b"\n")


class UnreachableError(Exception):
    """Process 0 cannot be reached; why."""


class Side:
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
        if self.settle(verdict):
            self.act(speak)

    def settle(self, verdict: str) -> bool:
        """Whether this is the first word on that they will not meet; whoever waits is told."""
        with self.changed:
            if self.over or self.verdict:
                return False
            self.verdict = verdict
            self.changed.notify_all()
        return True

    def act(self, speak: bool) -> None:
        """End this process, unless it ends by itself or waits for the others, and so is told."""
        self.stopped.wait(_ACTS_AFTER_S)
        if not self.over and not self.in_meeting:
            self.over = True
            if speak:
                notices.error(f"cola-ds: {self.verdict}")
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


class Guest(Side):
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
                with socket.create_connection((address, port), timeout=GRACE_S) as link:
                    link.settimeout(None)
                    with self.changed:
                        self.connection = link
                    if self.stopped.is_set():
                        return
                    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    self.reason = "somebody is there, but it is not process 0 of this run"
                    send(link, hello)
                    with link.makefile("rb") as lines:
                        if line := lines.readline(LINE_BYTES):
                            self.hear(link, lines, json.loads(line))
                            return
            except OSError as error:
                self.reason = error.strerror or str(error)
            except NO_MESSAGE:
                pass
            self.stopped.wait(TRIES_EVERY_S)

    def hear(self, link: socket.socket, lines: Any, welcome: dict[str, Any]) -> None:
        """Take what process 0 says, until the meeting is over or its connection ends."""
        host = f"process 0 on {welcome['welcome']} (pid {welcome['pid']})"
        with self.changed:
            self.link = link
            for message in self.unsent:
                send(link, message)
            self.changed.notify_all()
        status = None
        with contextlib.suppress(*NO_MESSAGE):
            while line := lines.readline(LINE_BYTES):
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
                send(self.link, message)

    def meet(self, wait_s: float, open_store: Callable[[float], Any]) -> Any:
        """See `rendezvous.meet`."""
        self.send({"arrived": True})
        deadline = time.monotonic() + wait_s
        with self.changed:
            self.in_meeting = True
            while not (self.link or self.verdict) and time.monotonic() < deadline:
                left_s = deadline - time.monotonic()
                if not self.changed.wait_for(lambda: self.link or self.verdict, min(left_s, REMINDS_EVERY_S)):
                    self.remind()
            if self.link is None and not self.verdict:
                raise UnreachableError(self.reason)
            self.changed.wait_for(lambda: self.ready or self.verdict, deadline + 2 * GRACE_S - time.monotonic())
            if self.verdict:
                if self.died_silently:  # nobody else says so
                    notices.error(f"cola-ds: {self.verdict}")
                raise UserError(self.verdict)
            if not self.ready:
                raise UnreachableError("it was reached, but has not arrived itself")
        try:
            return open_store(wait_s + 2 * GRACE_S)
        except RuntimeError as error:
            raise UnreachableError(first_line(error)) from None

    def remind(self) -> None:
        """One line while it waits for somebody to listen, from one process of each machine."""
        if self.speaks:
            where = f"{os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}"
            notices.notice(f"process {self.rank} on {self.host} does not reach process 0 at {where} yet: {self.reason}")

    def leave(self, status: int) -> None:
        self.send({"ended": status})
        self.over = True

    def stop(self) -> None:
        with self.changed:
            if self.unsent:  # process 0 would wait for what it was never told
                self.changed.wait_for(lambda: self.link, GRACE_S)
        super().stop()

    def connections(self) -> list[socket.socket]:
        return [self.connection] if self.connection else []

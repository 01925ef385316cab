"""Names the process that died or hangs, and ends the others: a collective that waits for it would wait for ever.

Each process keeps a connection to process 0, and says every second what it is doing. A process that dies closes its
connection at once, however it died; one that is stopped, or whose machine is gone, falls silent; one that hangs goes on
talking but does not move: processes run the same sequence of `heartbeat`s, so the one that made the fewest is the one that the
others wait for. All of it runs in three threads of its own, beside the training, however many processes there are.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from cola_ds import notices
from cola_ds.distributed import rendezvous
from cola_ds.distributed.launcher import Process, slurmstepd
from cola_ds.distributed.rendezvous_sides import shut

_EVERY_S = 1.0
_GRACE_S = 5.0  # process 0 speaks first
_SILENT_S = 60.0  # a process whose threads say nothing for so long is gone, or stopped
_SILENT_LOADING_S = 600.0  # or, before the first step, reads a large tensor from a slow disk
_HELLO_BYTES = 128
_LOOKS = 3  # in a row: a job that was suspended as a whole finds the others silent for a moment
_beats = 0
_step = 0
_doing = "starting"
_armed = False


def heartbeat(doing: str, step: int | None = None) -> None:
    """This process goes on to something else; every process calls this in the same order."""
    global _beats, _step, _doing, _armed
    if step is not None:
        _step = step
    _doing = f"step {_step}, {doing}" if _step else doing
    _beats += 1
    _armed = True


def rest() -> None:
    """From here to the next heartbeat there is no limit of time: a whole model is written, say."""
    global _armed
    _armed = False


def allow(limit_s: float) -> None:
    """From here on, so many seconds without progress."""
    if _current:
        _current.limit_s = limit_s


@dataclass
class _Peer:
    """What a process last said."""

    host: str = "?"
    pid: int = 0
    beats: int = 0
    doing: str = "starting"
    armed: bool = False
    heard: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)

    def take(self, said: dict[str, Any]) -> None:
        self.heard = time.monotonic()
        if said["beats"] != self.beats or not said["armed"]:
            self.moved = self.heard
        self.host, self.pid, self.beats = said["host"], said["pid"], said["beats"]
        self.doing, self.armed = said["doing"], said["armed"]


@dataclass(eq=False)
class _Incoming:
    """A connection, and what has come through it that is not a whole message yet."""

    link: socket.socket
    rank: int | None = None
    """Who is at its other end; None: it has not said so yet."""
    held: bytes = b""
    since: float = field(default_factory=time.monotonic)


_current: Watch | None = None


def begin(process: Process, limit_s: float | None, end: Callable[[int], None], share: Callable[[Any], Any]) -> None:
    """Start watching. `share` gives every process what process 0 has (collective). `end` is called in a thread with an exit
    status, and must end the process."""
    global _current
    _current = Watch(process, limit_s, end)
    offer = share(_current.listen() if process.rank == 0 else None)
    if process.rank == 0:
        _current.start(process.world_size)
    else:
        _current.join(os.environ["MASTER_ADDR"], **offer)


def begun() -> bool:
    """Whether this process has been in a group."""
    return _current is not None


def leave(status: int) -> None:
    """This process ends now with that status, and has itself said why."""
    rendezvous.leave(status)
    if _current:
        _current.leave(status)


def stop() -> None:
    """The watch is over, and everything here as before the first heartbeat: a process that goes on may take part in another run.

    After `leave`: who goes without a word is taken for dead by the others. Not in a thread of the watch.
    """
    global _current, _beats, _step, _doing, _armed
    watch, _current = _current, None
    _beats, _step, _doing, _armed = 0, 0, "starting", False
    if watch:
        watch.stop()


def process_0_leaves(within_s: float) -> bool:
    """Wait until process 0 has ended or said that it does; whether it did in that time. Never without a watch, or a meeting."""
    deadline = time.monotonic() + within_s
    while not rendezvous.process_0_left() if _current is None else 0 in _current._peers:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


class Watch:
    """This process's side of the watch."""

    def __init__(self, process: Process, limit_s: float | None, end: Callable[[int], None]):
        self.rank, self.limit_s, self.end = process.rank, limit_s, end
        self._is_first_here = process.local_rank == 0
        self._peers: dict[int, _Peer] = {}
        self._links: dict[int, socket.socket] = {}
        self._left = False
        self._lock = threading.Lock()
        self._server: socket.socket | None = None
        self._threads: list[threading.Thread] = []
        self._stopped = threading.Event()
        self._waker, self._wakes = socket.socketpair()
        """What is sent through the first one ends the wait of the thread that listens."""
        self._looks = 0
        self._supervised = slurmstepd()

    def listen(self) -> dict[str, Any]:
        """On process 0: open the port. Returns what the others need to `join`."""
        self._token = secrets.token_hex(16)
        self._server = socket.create_server(("", 0), family=socket.AF_INET, backlog=4096)
        return {"port": self._server.getsockname()[1], "token": self._token}

    def start(self, world_size: int) -> None:
        """On process 0: wait for the others in the background, and watch them."""
        self._peers = {rank: _Peer() for rank in range(world_size)}
        self._expected = world_size - 1
        self._thread(self._talk)
        self._thread(lambda: self._receive(None))
        self._thread(self._look)

    def join(self, address: str, port: int, token: str) -> None:
        """On every other process: say so to process 0, and go on saying it."""
        link = socket.create_connection((address, port), timeout=60)
        link.settimeout(None)
        self._links[0] = link
        self._peers[0] = _Peer()
        link.sendall(json.dumps({"token": token, "rank": self.rank}).encode().ljust(_HELLO_BYTES))
        self._thread(self._talk)
        self._thread(lambda: self._receive(_Incoming(link, rank=0)))
        self._thread(self._look)

    def leave(self, status: int) -> None:
        """Say goodbye to the others."""
        self._left = True
        self._say({"bye": status}, list(self._links.values()))

    def stop(self) -> None:
        """End every thread and close every connection."""
        self._left = True
        self._stopped.set()
        self._waker.send(b"\0")
        while self._threads:  # the one that listens may connect another, and the one that talks wait for it
            for link in list(self._links.values()):
                shut(link)
            self._threads.pop(0).join()
        self._waker.close()
        self._wakes.close()

    # -- threads -------------------------------------------------------------------------------------------------------

    def _thread(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name="watch", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _say(self, message: dict[str, Any], links: Iterable[socket.socket]) -> None:
        said = json.dumps(message).encode() + b"\n"
        for link in links:
            with contextlib.suppress(OSError), self._lock:
                link.sendall(said)

    def _state(self) -> dict[str, Any]:
        return {"host": socket.gethostname(), "pid": os.getpid(), "beats": _beats, "doing": _doing, "armed": _armed}

    def _talk(self) -> None:
        while not self._left:
            self._say(self._state(), list(self._links.values()))
            self._stopped.wait(_EVERY_S)

    def _receive(self, incoming: _Incoming | None) -> None:
        """Take what the others say, on process 0 of all who connect and elsewhere of process 0, until the watch is over."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._wakes, selectors.EVENT_READ)
            if incoming:
                selector.register(incoming.link, selectors.EVENT_READ, incoming)
            if self._server:
                selector.register(self._server, selectors.EVENT_READ)
            strangers: list[_Incoming] = []
            while not self._stopped.is_set():
                for key, _ in selector.select(_EVERY_S):
                    if key.fileobj is self._server:
                        with contextlib.suppress(OSError):  # whoever it was has gone
                            link, _ = self._server.accept()
                            strangers.append(_Incoming(link))
                            selector.register(link, selectors.EVENT_READ, strangers[-1])
                    elif key.data and not self._take(key.data):
                        selector.unregister(key.fileobj)
                        if key.data.rank is None:
                            strangers.remove(key.data)
                            key.data.link.close()
                if self._server and not self._expected:
                    selector.unregister(self._server)
                    self._server.close()
                    self._server = None
                strangers = [each for each in strangers if each.rank is None]
                for each in [each for each in strangers if time.monotonic() - each.since > _GRACE_S]:
                    strangers.remove(each)
                    selector.unregister(each.link)
                    each.link.close()
        if self._server:
            self._server.close()

    def _take(self, incoming: _Incoming) -> bool:
        """Take what has come through a connection; whether there may be more."""
        try:
            came = incoming.link.recv(2**16)
        except OSError:
            came = b""
        incoming.held += came
        if incoming.rank is None and len(incoming.held) >= _HELLO_BYTES:
            hello, incoming.held = incoming.held[:_HELLO_BYTES], incoming.held[_HELLO_BYTES:]
            incoming.rank = self._greet(incoming.link, hello)
            if incoming.rank is None:
                return False
        if incoming.rank is None:
            return bool(came)
        *lines, incoming.held = incoming.held.split(b"\n")
        if all(self._hear(incoming.rank, line) for line in lines) and came:
            return True
        if not came:
            self._lost(incoming.rank)
        return False

    def _greet(self, link: socket.socket, hello: bytes) -> int | None:
        """Who has connected; None for a stranger, who does not know the token."""
        try:
            said = json.loads(hello)
            known = secrets.compare_digest(str(said["token"]).encode(), self._token.encode())
            rank = said["rank"]
        except Exception:  # whatever a stranger's bytes may raise
            return None
        if not known or rank not in self._peers or rank in self._links:
            return None
        self._links[rank] = link
        self._expected -= 1
        self._say(self._state(), [link])  # at once: it may be stopped before it talks, and must have been named
        return int(rank)

    def _hear(self, rank: int, line: bytes) -> bool:
        """Take a message; whether that process will say more."""
        peer = self._peers[rank]
        try:
            said = json.loads(line)
        except ValueError:
            self._lost(rank)
            return False
        if "bye" in said:
            self._links.pop(rank, None)
            self._peers.pop(rank, None)
            if said["bye"] != 0:
                self._thread(lambda: self._ended(rank, peer, said["bye"]))
            return False
        if "end" in said:
            self._die(said.get("why"), said["end"])
            return False
        peer.take(said)
        return True

    def _ended(self, rank: int, peer: _Peer, status: int) -> None:
        """A process has ended by itself. Launchers end the others; if this one does not, they would wait."""
        self._stopped.wait(2 * _GRACE_S)
        self._die(f"process {rank} on {peer.host} ended with status {status}", [], status)

    def _lost(self, rank: int) -> None:
        """A connection has ended without a goodbye."""
        peer = self._peers.get(rank)
        if peer is not None and not self._left:
            self._die(f"process {rank} on {peer.host} (pid {peer.pid}) died; it was at {peer.doing}", [])
        self._peers.pop(rank, None)

    def _look(self) -> None:
        """Find out who is silent, and on process 0 who does not move."""
        while not self._stopped.wait(_EVERY_S) and not self._left:
            peers = dict(self._peers)
            if self.rank == 0:
                peers[0].take(self._state())
            if self._supervised is not None and not self._supervised():
                who = f"process {self.rank} on {socket.gethostname()} (pid {os.getpid()})"
                self._die(f"{who} is an orphan: its slurmstepd died", [], tell=True)  # which took its output along
            self._find_silent(peers)
            if self.rank == 0 and self.limit_s is not None and any(peer.armed for peer in peers.values()):
                self._find_hanging(peers, self.limit_s)

    def _find_silent(self, peers: dict[int, _Peer]) -> None:
        limit_s = _SILENT_LOADING_S
        if _armed or any(peer.armed for peer in peers.values()):
            limit_s = min(_SILENT_S, self.limit_s or _SILENT_S)
        limit_s += _GRACE_S if self.rank else 0
        for rank, peer in peers.items():
            silent_s = time.monotonic() - peer.heard
            if silent_s > limit_s:
                self._looks += 1
                if self._looks >= _LOOKS:
                    self._die(
                        f"process {rank} on {peer.host} (pid {peer.pid}) has said nothing for {silent_s:.0f} s; "
                        f"it was at {peer.doing}",
                        [self.rank],
                    )
                return
        self._looks = 0

    def _find_hanging(self, peers: dict[int, _Peer], limit_s: float) -> None:
        now = time.monotonic()
        if any(now - peer.heard > _LOOKS * _EVERY_S for peer in peers.values()):
            return  # that one does not hang, it is silent
        if all(now - peer.moved > limit_s for peer in peers.values()):
            least = min(peer.beats for peer in peers.values())
            stuck = [rank for rank, peer in peers.items() if peer.beats == least]
            peer = peers[stuck[0]]
            names = f"process {stuck[0]} on {peer.host} (pid {peer.pid})"
            if len(stuck) > 1:
                names = f"processes {', '.join(map(str, stuck))}"
            self._die(f"{names} made no progress for {now - peer.moved:.0f} s, at {peer.doing}", [stuck[0], 0])

    def _die(self, reason: str | None, dump: list[int], status: int = 3, tell: bool = False) -> None:
        """End this process, and through process 0 the others; those in `dump` show where each of their threads is. With
        `tell` the others give the reason too."""
        if self._left:
            return
        self._left = True
        # one process a node, once process 0 is gone
        if reason and (self.rank <= 1 or self._is_first_here):
            notices.error(f"cola-ds: {reason}")
        self._say({"end": dump, "why": reason if tell else None}, list(self._links.values()))
        with contextlib.suppress(OSError):
            if self.rank in dump:
                print(
                    f"cola-ds: threads of process {self.rank} on {socket.gethostname()}:", file=sys.stderr, flush=True
                )
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        self.end(status)

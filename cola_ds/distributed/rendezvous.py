"""Before a group of processes begins: who has arrived, who has not, and who has died. torch itself waits without a word.

All meet at process 0, which listens at MASTER_ADDR and MASTER_PORT from its first moment on. Each of the others connects at its
own first moment, and keeps the connection until all have arrived: one that dies closes it, however it died, and one that fails
says so. The store that the group then begins with is opened at the same port. All of it runs beside the loading, in a thread:
process 0 listens to all the others in one.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from typing import Any

from cola_ds.distributed.deepspeed_internals import end_process
from cola_ds.distributed.launcher import Process
from cola_ds.distributed.rendezvous_host import Host
from cola_ds.distributed.rendezvous_sides import Guest, UnreachableError
from cola_ds.errors import ArrivalError, some_of

_current: Host | Guest | None = None


def begin(process: Process, end: Callable[[int], None]) -> None:
    """Be there for the others, and watch them until all have met. `end` is called in a thread with an exit status, and must end
    the process. Nothing is raised: what cannot be is said by `meet`."""
    global _current
    if _current is None and process.world_size > 1 and not by_agent():
        _current = Host(process, end) if process.rank == 0 else Guest(process, end)


def meet(process: Process, wait_s: float, open_store: Callable[[float], Any], interface_variable: str) -> Any:
    """Wait until every process has arrived here. Collective.

    `open_store` opens the store, given a timeout in seconds. Returns it; process 0 must keep it until the group has begun.

    Raises ArrivalError on process 0, and UserError on the others that arrived, naming those who did not, or died; ArrivalError on
    one that cannot reach process 0.
    """
    begin(process, end_process)
    assert _current is not None
    try:
        return _current.meet(wait_s, open_store)
    except UnreachableError as error:
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        raise ArrivalError(
            f"process {process.rank} on {_current.host} cannot reach process 0 at {address} ({_resolved(address)}), port {port}, "
            f"within {wait_s:g} s: {error}; see that process 0 runs, that the name leads to its host (else set "
            f"MASTER_ADDR), that no firewall closes the port, and, where hosts have several networks, set "
            f"{interface_variable} to the one between them"
        ) from None


def leave(status: int) -> None:
    """This process ends now with that status."""
    if _current:
        _current.leave(status)


def stop() -> None:
    """Forget the meeting: a process that goes on after a run may take part in another. After `leave`, where they have not met."""
    global _current
    side, _current = _current, None
    if side:
        side.stop()


def say_why(message: str) -> None:
    """Tell process 0 what this process ends with, after `leave`."""
    if isinstance(_current, Guest):
        _current.send({"said": message})


def process_0_left() -> bool:
    """Whether process 0 has ended before all had met."""
    return isinstance(_current, Guest) and _current.host_left


def by_agent() -> bool:
    """Whether torchrun's agent listens there itself, and ends the others when a process ends."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _resolved(address: str) -> str:
    try:
        return some_of(sorted({str(found[4][0]) for found in socket.getaddrinfo(address, None)}))
    except OSError:
        return "a name that is not known here"


def share(store: Any, rank: int, value: Any) -> Any:
    """What process 0 gives, as `broadcast_object` does where there is a group."""
    if rank == 0:
        store.set("shared", json.dumps(value))
    return json.loads(store.get("shared"))

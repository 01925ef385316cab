"""Before a group of processes begins: who has arrived, and who has not. torch itself waits for those without a word.

All meet at a key-value store that process 0 serves at MASTER_ADDR and MASTER_PORT, the one that the group then begins with.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from cola_ds.errors import ArrivalError, UserError, first_line, some_of
from cola_ds.launcher import Process

_GRACE_S = 3.0  # for an answer of a process that is there


def meet(process: Process, wait_s: float, open_store: Callable[[float], Any], interface_variable: str) -> Any:
    """Wait until every process has reached process 0. Collective.

    `open_store` opens the store, given a timeout in seconds. Returns it; process 0 must keep it until the group has begun.

    Raises ArrivalError on process 0, and UserError on the others that arrived, naming those who did not; ArrivalError on one
    that cannot reach process 0.
    """
    address, port, host = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), socket.gethostname()
    reason = _try_to_reach(address, port, wait_s) if process.rank else ""
    try:
        if reason:
            raise RuntimeError(reason)
        store = open_store(wait_s + 2 * _GRACE_S)
        store.set(f"arrived/{process.rank}", host)
        absent = _call_roll(store, process.world_size, wait_s) if process.rank == 0 else store.get("absent").decode()
        store.set(f"heard/{process.rank}", "")
    except RuntimeError as error:
        raise ArrivalError(
            f"process {process.rank} on {host} cannot reach process 0 at {address} ({_resolved(address)}), port {port}, within "
            f"{wait_s:g} s: {reason or first_line(error)}; see that process 0 runs, that the name leads to its host (else set "
            f"MASTER_ADDR), that no firewall closes the port, and, where hosts have several networks, set "
            f"{interface_variable} to the one between them"
        ) from None
    if absent:
        raise (UserError if process.rank else ArrivalError)(absent)
    return store


def _try_to_reach(address: str, port: int, wait_s: float) -> str:
    """Wait until somebody listens there; why nobody does, if so. torch's own way of saying it fills a screen."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            socket.create_connection((address, port), timeout=max(deadline - time.monotonic(), 1)).close()
            return ""
        except OSError as error:
            if time.monotonic() > deadline:
                return error.strerror or str(error)
        time.sleep(0.1)


def _call_roll(store: Any, world_size: int, wait_s: float) -> str:
    """On process 0: wait for all, and tell them how it ended. Returns what is to be said of those who did not come, if any."""
    _wait_for(store, range(world_size), "arrived", wait_s)
    here = [rank for rank in range(world_size) if store.check([f"arrived/{rank}"])]
    absent = [str(rank) for rank in range(world_size) if rank not in here]
    hosts = sorted({store.get(f"arrived/{rank}").decode() for rank in here})
    arrived = [host.partition(".")[0] for host in hosts]
    empty = [
        node for node in _nodes(os.environ.get("SLURM_STEP_NODELIST", "")) if node.partition(".")[0] not in arrived
    ]
    said = (
        f"process{'es' if len(absent) > 1 else ''} {some_of(absent)} did not arrive within {wait_s:g} s"
        + (f" (none from {some_of(empty)})" if empty else "")
        + f"; {len(here)} of {world_size} did, from {some_of(hosts)}; look at what the others printed, and whether their hosts "
        f"reach {os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}"
    )
    store.set("absent", said if absent else "")
    if absent:
        _wait_for(store, here[1:], "heard", _GRACE_S)  # the store goes with this process
    return said if absent else ""


def _wait_for(store: Any, ranks: Sequence[int], key: str, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while ranks and not store.check([f"{key}/{rank}" for rank in ranks]) and time.monotonic() < deadline:
        time.sleep(0.1)


def _nodes(names: str) -> list[str]:
    """The nodes of a Slurm list such as "a1,b[2-3,07]-ib"; not those of one with several brackets in a name."""
    nodes: list[str] = []
    for before, numbers, after in re.findall(r"([^,\[\]]+)(?:\[([\d,-]+)\]([^,\[\]]*))?(?=,|$)", names):
        for part in filter(None, numbers.split(",")):
            first, _, last = part.partition("-")
            nodes += [f"{before}{n:0{len(first)}}{after}" for n in range(int(first), int(last or first) + 1)]
        nodes += [] if numbers else [before]
    return nodes


def _resolved(address: str) -> str:
    try:
        return some_of(sorted({str(found[4][0]) for found in socket.getaddrinfo(address, None)}))
    except OSError:
        return "a name that is not known here"


def share(store: Any, rank: int, value: Any) -> Any:
    """What process 0 gives, as from_process_0 does where there is a group."""
    if rank == 0:
        store.set("shared", json.dumps(value))
    return json.loads(store.get("shared"))

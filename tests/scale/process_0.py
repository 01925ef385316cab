"""Process 0 among many, and the many: real sockets and stores, no training.

    python -m tests.scale.process_0 PORT PROCESSES [SECONDS]
    python -m tests.scale.process_0 --others PORT PROCESSES

The first meets the others, opens the store, watches them, and prints what that took as JSON. The second is all of the others in
one process, each with the threads, connections and the store that it would have in its own.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from datetime import timedelta

from torch.distributed import TCPStore

from cola_ds.distributed import rendezvous, watchdog
from cola_ds.distributed.launcher import Process
from cola_ds.distributed.rendezvous_sides import Guest

WAIT_S = 120.0


def open_store(world_size: int, is_host: bool, timeout_s: float) -> TCPStore:
    """As cola_ds/distributed/collectives.py does."""
    return TCPStore(
        "127.0.0.1", int(os.environ["MASTER_PORT"]), world_size, is_host, timedelta(seconds=timeout_s),
        wait_for_workers=False, multi_tenant=True,
    )  # fmt: skip


def rounds(seconds: float) -> float:
    """What Python computes in a second, in this thread."""
    count, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        sum(range(1000))
        count += 1
    return count / seconds


def process_0(world_size: int, seconds: float) -> None:
    """Meet, watch, and say what it took."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
    process = Process(0, 0, world_size)
    begun = time.perf_counter()
    rendezvous.begin(process, lambda status: os._exit(status))
    host = rendezvous._current
    assert host is not None
    while len(host.peers) < world_size - 1 and time.perf_counter() - begun < WAIT_S:
        time.sleep(0.01)
    meeting_threads = threading.active_count()
    store = rendezvous.meet(process, WAIT_S, lambda timeout_s: open_store(world_size, True, timeout_s), "none")
    met_s = time.perf_counter() - begun
    watchdog.begin(process, None, os._exit, lambda value: rendezvous.share(store, 0, value))
    watch = watchdog._current
    assert watch is not None
    while len(watch._links) < world_size - 1 and time.perf_counter() - begun < WAIT_S:
        time.sleep(0.01)
    watched_s = time.perf_counter() - begun - met_s
    time.sleep(2)
    cpu, wall = time.process_time(), time.perf_counter()
    time.sleep(seconds)
    share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    own, all_threads = time.thread_time(), time.process_time()
    rounds(seconds)
    own, all_threads = time.thread_time() - own, time.process_time() - all_threads
    heard = time.monotonic() - min(peer.heard for rank, peer in watch._peers.items() if rank)
    found = {
        "meeting_threads": meeting_threads, "met_s": met_s,
        "watched_s": watched_s, "watched": len(watch._links), "silent_s": heard, "cpu_share": share,
        "watching": 1 - own / all_threads, "files": len(os.listdir("/proc/self/fd")), "threads": threading.active_count(),
    }  # fmt: skip
    print(json.dumps(found), flush=True)
    os._exit(0)


def others(world_size: int) -> None:
    """All processes but 0."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    kept = []

    def one(rank: int) -> None:
        side = Guest(Process(rank, rank, world_size), lambda status: None)
        store = side.meet(WAIT_S, lambda timeout_s: open_store(world_size, False, timeout_s))
        offer = rendezvous.share(store, rank, None)
        watch = watchdog.Watch(Process(rank, rank, world_size), None, lambda status: None)
        watch.join("127.0.0.1", **offer)
        kept.append((side, store, watch))

    for rank in range(1, world_size):
        threading.Thread(target=one, args=(rank,), daemon=True).start()
    for step in range(600):
        watchdog.heartbeat("step", step=step)
        time.sleep(1)


if __name__ == "__main__":
    threading.stack_size(256 * 1024)
    words = [word for word in sys.argv[1:] if word != "--others"]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=words[0], RANK="0", WORLD_SIZE=words[1])
    if "--others" in sys.argv:
        others(int(words[1]))
    else:
        process_0(int(words[1]), float(words[2]) if len(words) > 2 else 5.0)

"""All processes of a large run, each a process of its own, agreeing: no training.

    python -m tests.scale.crowd PROCESSES PER_NODE [DIFFERING_RANK]

Forked from one that has imported everything, so that 512 fit one machine. They meet, begin the group over gloo, compare what they
run, make the groups of nodes (of PER_NODE processes; 0: none, as every group of gloo's polls 100 times a second, and two cores do
not bear three groups of 512), and compare a layer's A and B. Process 0 prints as JSON what that took, and what differed.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any

import torch
from torch import nn

from cola_ds.distributed import collectives, nodes, rendezvous
from cola_ds.distributed.launcher import Process, allow_open_files, free_port
from cola_ds.errors import TrainingFailedError
from cola_ds.training.preflight import differences

WAIT_S = 900.0


def agree(process: Process, per_node: int, differing: int) -> dict[str, Any]:
    """What the start of a run asks all processes, and a knot. Collective."""
    took: dict[str, Any] = {}
    begun = time.perf_counter()

    def note(what: str) -> None:
        nonlocal begun
        took[what], begun = round(time.perf_counter() - begun, 3), time.perf_counter()
        if process.rank == 0:
            print(f"{what} {took[what]}", file=sys.stderr, flush=True)

    rendezvous.begin(process, lambda status: os._exit(status))
    collectives.init_process_group(process, wait_s=WAIT_S)
    note("group_s")
    mine = {"torch": "other" if process.rank == differing else torch.__version__, "data": "a" * 64, "config": "b" * 64}
    took["differences"] = differences(collectives.all_gather_objects(mine), collectives.hosts())
    note("facts_s")
    took["least_memory"] = collectives.least_memory()[0] > 0
    took["heard"] = collectives.broadcast_object({"step": 7} if process.rank == 0 else None)["step"]
    note("small_s")
    if per_node:
        first = range(0, process.world_size, per_node)
        nodes.make_groups([list(range(begin, begin + per_node)) for begin in first])
        note("node_groups_s")
    layer = nn.Linear(64, 8)
    nn.init.constant_(layer.weight, 2.0 if process.rank == differing else 1.0)
    nn.init.zeros_(layer.bias)
    try:
        nodes.check_alike(layer, [], 3)
        took["drift"] = None
    except TrainingFailedError as error:
        took["drift"] = str(error)
    note("alike_s")
    took["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    collectives.on_all(lambda: None)
    return took


def main(size: int, per_node: int, differing: int) -> None:
    """Fork them, wait for all, and end with the first status that is not 0."""
    refused = allow_open_files(size)
    assert refused is None, refused
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    children = []
    for rank in range(size):
        if (child := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % (per_node or 8))}
            found = agree(Process(rank, rank % (per_node or 8), size), per_node, differing)
            if rank == 0:
                print(json.dumps(found), flush=True)
            os._exit(0)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(next((status for status in statuses if status), 0))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else -1)

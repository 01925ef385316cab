"""Real multi-process runs: `run_distributed(fn, world_size, *args)` calls fn(process, *args) in each of `world_size` processes.

The processes are forked from a server that has imported torch, transformers and deepspeed already, so that a run costs
seconds. Every run has a hard timeout, after which its processes are killed.
"""

import io
import multiprocessing as mp
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cola_ds.distributed.launcher import Process, free_port, identify

_server = mp.get_context("forkserver")
_server.set_forkserver_preload(["tests.support.preload"])


class WorkerFailedError(AssertionError):
    """A process of a run raised, died or did not end in time."""


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 300) -> list[Any]:
    """Run `fn`, a function of a test module, and return what each process returned (tensors, numbers, text), by rank.

    Raises WorkerFailedError with the traceback of the first process that failed.
    """
    port = free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        receive, send = _server.Pipe(duplex=False)
        process = _server.Process(target=_work, args=(send, rank, world_size, port, fn, args), daemon=True)
        process.start()
        send.close()
        pipes.append(receive)
        processes.append(process)
    try:
        return _collect(pipes, processes, deadline=time.monotonic() + timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], processes: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        for rank, pipe in enumerate(pipes):
            if rank in results or not pipe.poll(0.05):
                continue
            try:
                ok, value = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=True)
            except EOFError:
                processes[rank].join(5)
                raise WorkerFailedError(f"process {rank} died with status {processes[rank].exitcode}") from None
            if not ok:
                raise WorkerFailedError(f"process {rank} failed:\n{value}")
            results[rank] = value
        if time.monotonic() > deadline:
            missing = sorted(set(range(len(pipes))) - set(results))
            raise WorkerFailedError(f"processes {missing} did not end in time")
    return [results[rank] for rank in range(len(pipes))]


def _work(
    pipe: Connection, rank: int, world_size: int, port: int, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update(
        {name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    try:
        result = (True, fn(identify(), *args))
    except BaseException:
        result = (False, traceback.format_exc())
    encoded = io.BytesIO()
    torch.save(result, encoded)
    pipe.send_bytes(encoded.getvalue())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # no exit handlers: a process group whose peer failed would wait in them


def process_group(process: Process) -> None:
    """Join the group of the run, as the command does."""
    from cola_ds.distributed import collectives

    collectives.init_process_group(process)


def _ranks_of(group):
    from torch.distributed import ProcessGroup, get_process_group_ranks

    return get_process_group_ranks(ProcessGroup.unbox(group))


class CountedCollectives(TorchDispatchMode):
    """Counts what the collectives inside the block carry, whoever calls them, below DeepSpeed and torch.distributed."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, int]] = []
        """The operation, and the bytes of what this process ends up with or gives: the larger of outputs and inputs."""
        self.ranks: list[list[int]] = []
        """The processes that take part in each."""

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.calls)

    def by_place(self, hosts: list[str], rank: int) -> tuple[int, int]:
        """Bytes of those in which another host's processes take part, and of those within this one's. `hosts` names that of every
        process; `rank` is this one's."""
        here = {hosts[rank]}
        away = [{hosts[other] for other in ranks} - here for ranks in self.ranks]
        across = sum(size for (_, size), others in zip(self.calls, away, strict=True) if others)
        return across, self.bytes - across

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            sizes = [
                sum(t.numel() * t.element_size() for t in tree_leaves(arg) if isinstance(t, torch.Tensor))
                for arg in args
            ]
            self.calls.append((func._opname, max(sizes, default=0)))
            groups = [arg for arg in tree_leaves(args) if isinstance(arg, torch.ScriptObject)]
            self.ranks.append(_ranks_of(groups[0]) if groups else [])
        return func(*args, **(kwargs or {}))

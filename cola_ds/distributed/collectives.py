"""Collectives: the process group of a run, and what its processes tell each other.

Every function here that says "collective" must be called by all processes together.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.distributed import TCPStore

from cola_ds.distributed import rendezvous
from cola_ds.distributed.accelerator import (
    backend,
    device,
    interface_variable,
    memory_bytes,
    prepare_compilation,
    take_device,
)
from cola_ds.distributed.deepspeed_internals import remove_shared_memory_name
from cola_ds.distributed.launcher import Process
from cola_ds.distributed.rendezvous_sides import port_taken
from cola_ds.errors import UserError

Value = TypeVar("Value")
NO_LIMIT = timedelta(days=20)
"""How long a collective may wait: as long as it takes, as the watch is what ends a run (run.hang_after_s). In milliseconds it
fits into the 32 bits that a socket's wait has."""


def init_process_group(
    process: Process, wait_s: float = 600, begin_watch: Callable[[Callable[[Any], Any]], None] | None = None
) -> None:
    """Join the process group over the accelerator's own backend, once all processes have arrived. Collective.

    `begin_watch` is called as soon as they have, with a function that gives all what process 0 has: a group that does not begin
    is waited for long, and without a word. Raises UserError when this machine has fewer accelerators than processes, when two
    processes have the same one, when the port of process 0 is taken, when an interrupted compilation has left a lock that
    DeepSpeed's own would wait for, and when processes do not arrive in time.
    """
    take_device(process)
    # fp32 means fp32: some containers' images set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, and ties would lose 13 bits of 24.
    torch.set_float32_matmul_precision("highest")
    agent = rendezvous.by_agent()
    if process.world_size == 1 and not agent and not dist.is_initialized():
        _check_port(int(os.environ["MASTER_PORT"]))
    prepare_compilation()
    store = None
    if process.world_size > 1 and not agent and not dist.is_initialized():
        # Process 0 keeps it: the group that begins below finds its server.
        store = rendezvous.meet(process, wait_s, partial(_open_store, process), interface_variable())
        if begin_watch:
            begin_watch(partial(rendezvous.share, store, process.rank))
    warnings.filterwarnings(
        "ignore", category=FutureWarning, message=".*all_gather_into_tensor.*|.*reduce_scatter_tensor.*"
    )
    try:
        # Each process says that it has built an operation, built or not.
        with contextlib.redirect_stdout(io.StringIO()):
            deepspeed.init_distributed(
                dist_backend=backend(), auto_mpi_discovery=False, verbose=False, timeout=NO_LIMIT
            )
        index = device().index  # None on the CPU; elsewhere NCCL would guess it from the rank
        dist.barrier(device_ids=None if index is None else [index])
    except RuntimeError as error:
        if "Duplicate GPU" not in str(error):
            raise
        raise UserError(
            f"process {process.rank} on {socket.gethostname()} has the same accelerator as another process; "
            "start one process per accelerator"
        ) from None
    remove_shared_memory_name()
    if begin_watch and store is None:
        begin_watch(broadcast_object)


def _open_store(process: Process, timeout_s: float) -> TCPStore:
    """What torch opens as well when a group begins: process 0 holds its server. Here it waits for nobody."""
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        process.world_size,
        process.rank == 0,
        timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=True,
    )


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise port_taken(port, error) from None


def destroy_process_group() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def falls_to_this_process(number: int) -> bool:
    """Whether this process takes the thing of that number, where things go round all processes."""
    return number % dist.get_world_size() == dist.get_rank()


def all_reduce_sum(values: Tensor) -> Tensor:
    """Add a tensor (on this process's device) element by element over all processes, in place. Collective."""
    dist.all_reduce(values)
    return values


def all_reduce_max(values: Sequence[float | Tensor]) -> list[float]:
    """The largest of each of some numbers per process: plain ones, or tensors () on its device. Collective.

    The device is waited for once, when the answer is read.
    """
    here = device()
    numbers = [
        value.double() if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float64, device=here)
        for value in values
    ]
    held = torch.stack(numbers)
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return [float(value) for value in held.tolist()]


def all_gather_numbers(value: float) -> list[float]:
    """One number per process, in the order of their ranks. Collective."""
    mine = torch.tensor([value], dtype=torch.float64, device=device())
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, mine)
    return [float(held.item()) for held in theirs]


def least_memory() -> tuple[int, int]:
    """What the process with least memory has, in bytes: where it computes, and on its host. Collective."""
    names = hosts()
    device_bytes, host_bytes = memory_bytes(names.count(names[dist.get_rank()]))
    least = [-value for value in all_reduce_max([-device_bytes, -host_bytes])]
    return int(least[0]), int(least[1])


def all_gather_ints(mine: Tensor) -> list[list[int]]:
    """One int64 tensor (n,) per process, of one length, in the order of their ranks. Collective."""
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, mine)
    return [held.tolist() for held in theirs]


def all_gather_bytes(mine: Tensor) -> list[Tensor]:
    """One uint8 tensor (n,) per process, of one length, in the order of their ranks, on the host. Collective."""
    here = mine.to(device())
    theirs = [torch.empty_like(here) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, here)
    return [held.cpu() for held in theirs]


def broadcast_object(value: Any) -> Any:
    """What process 0 gives, of what JSON can say; the others' value is ignored. Collective."""
    encoded = json.dumps(value).encode() if dist.get_rank() == 0 else b""
    size = torch.tensor([len(encoded)], dtype=torch.int64, device=device())
    dist.broadcast(size, src=0)
    held = torch.zeros(int(size.item()), dtype=torch.uint8, device=device())
    if dist.get_rank() == 0:
        held.copy_(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))
    dist.broadcast(held, src=0)
    return json.loads(bytes(held.tolist()))


def on_rank_0(action: Callable[[], Any]) -> Any:
    """What an action returns that process 0 alone takes (as JSON can say it). A UserError in it, all raise. Collective."""
    answer = {}
    if dist.get_rank() == 0:
        try:
            answer = {"value": action()}
        except UserError as error:
            answer = {"mistake": str(error)}
    answer = broadcast_object(answer)
    if "mistake" in answer:
        raise UserError(answer["mistake"])
    return answer["value"]


def on_all(action: Callable[[], Value]) -> Value:
    """What an action returns that every process takes for itself. A UserError of one, all raise. Collective."""
    answer: list[Value] = []
    mistake = ""
    try:
        answer.append(action())
    except UserError as error:
        mistake = str(error)
    if first := next(filter(None, all_gather_objects(mistake)), None):
        raise UserError(first)
    return answer[0]


def on_rank_0_with_all(action: Callable[[Callable[[list[Any]], list[Any]]], Any], work: Callable[[Any], Any]) -> Any:
    """As `on_rank_0`, but the action may share work out: what it is given takes a list, and returns what `work` makes of each
    entry, on one process or another. Collective."""

    def together(entries: Any) -> list[Any] | None:
        entries = broadcast_object(entries)
        if entries is None:
            return None
        size = dist.get_world_size()
        shares = all_gather_objects([work(entry) for entry in entries[dist.get_rank() :: size]])
        return [shares[number % size][number // size] for number in range(len(entries))]

    def taken() -> Any:
        try:
            return action(together)  # type: ignore[arg-type]
        finally:
            broadcast_object(None)

    if dist.get_rank() == 0:
        return on_rank_0(taken)
    while together(None) is not None:
        pass
    return on_rank_0(lambda: None)


def broadcast_bytes(tensor: Tensor | None, count: int) -> Tensor:  # -> (count,) uint8, on the host
    """Process 0's tensor; the others give None. Collective."""
    held = torch.empty(count, dtype=torch.uint8, device=device()) if tensor is None else tensor.to(device())
    dist.broadcast(held, src=0)
    return held.cpu()


def broadcast_tensor(tensor: Tensor | None, count: int) -> Tensor:  # -> (count,), fp32, on the device
    """Process 0's tensor, flat; the others give None. Collective."""
    held = torch.empty(count, device=device()) if tensor is None else tensor.flatten().to(device(), torch.float32)
    dist.broadcast(held, src=0)
    return held


def all_gather_texts(text: str, size: int = 256) -> list[str]:
    """One text per process, in the order of their ranks; cut after `size` bytes. Collective. Nothing is pickled."""
    encoded = text.encode(errors="replace")[:size].ljust(size, b"\0")  # a host's name may be any bytes
    mine = torch.tensor(list(encoded), dtype=torch.uint8, device=device())
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, mine)
    return [bytes(held.tolist()).rstrip(b"\0").decode(errors="replace") for held in theirs]


def hosts() -> list[str]:
    """The name of every process's host, in the order of their ranks. Collective."""
    return all_gather_texts(socket.gethostname())


def all_gather_objects(value: Any) -> list[Any]:
    """One value per process, of what JSON can say, in the order of their ranks. Collective."""
    encoded = json.dumps(value)
    return [json.loads(text) for text in all_gather_texts(encoded, int(all_reduce_max([len(encoded)])[0]))]


def time_collectives(reduced: int, given: int, rounds: int = 5) -> dict[str, float]:
    """Median seconds of an all-reduce of so many bytes, and of an all-gather to which each process gives so many, in the slowest
    process. Collective."""
    whole, mine = (torch.ones(size // 4, device=device()) for size in (reduced, given))
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    reduce = _median_seconds(lambda: dist.all_reduce(whole), rounds)
    gather = _median_seconds(lambda: dist.all_gather(theirs, mine), rounds)
    return dict(zip(("all-reduce", "all-gather"), all_reduce_max([reduce, gather]), strict=True))


def time_exchange(peer: int, size: int, rounds: int = 3) -> float:
    """Median seconds in which this process and `peer` give each other so many bytes at once. Both call it; others need not."""
    give, take = (torch.zeros(size, dtype=torch.uint8, device=device()) for _ in range(2))

    def exchange() -> None:
        both = [dist.P2POp(dist.isend, give, peer), dist.P2POp(dist.irecv, take, peer)]
        for request in dist.batch_isend_irecv(both):
            request.wait()

    return _median_seconds(exchange, rounds)


def _median_seconds(action: Callable[[], Any], rounds: int) -> float:
    taken = []
    for _ in range(rounds + 1):
        get_accelerator().synchronize()
        since = time.perf_counter()
        action()
        get_accelerator().synchronize()
        taken.append(time.perf_counter() - since)
    return statistics.median(taken[1:])  # the first one opens connections

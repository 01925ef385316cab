"""The processes of a run together: their group, and what they tell each other. With zero.py, all that imports deepspeed.

Every function here that says "collective" must be called by all processes together.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import shutil
import socket
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

# The engine's log lines would drown the run's own; DeepSpeed's warnings stay.
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
_COMPILATION_MINUTES = 15
# DeepSpeed compiles operations on first use. Environments that shared one cache would rebuild each other's copies.
if sys.prefix != sys.base_prefix:
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))

import deepspeed  # noqa: E402
import torch  # noqa: E402
from deepspeed import comm as dist  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.distributed import TCPStore  # noqa: E402

from cola_ds import arrival  # noqa: E402
from cola_ds.errors import UserError  # noqa: E402
from cola_ds.launcher import Process  # noqa: E402


def start_processes(
    process: Process, wait_s: float = 600, begin_watch: Callable[[Callable[[Any], Any]], None] | None = None
) -> None:
    """Join the process group over the accelerator's own backend, once all processes have arrived. Collective.

    `begin_watch` is called as soon as they have, with a function that gives all what process 0 has: a group that does not begin
    is waited for long, and without a word. Raises UserError when this machine has fewer accelerators than processes, when two
    processes have the same one, when the port of process 0 is taken, when an interrupted compilation has left a lock that
    DeepSpeed's own would wait for, and when processes do not arrive in time.
    """
    _take_device(process)
    # fp32 means fp32: some containers' images set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, and ties would lose 13 bits of 24.
    torch.set_float32_matmul_precision("highest")
    agent = arrival.by_agent()
    if process.world_size == 1 and not agent and not dist.is_initialized():
        _check_port(int(os.environ["MASTER_PORT"]))
    _check_compilation()
    store = None
    if process.world_size > 1 and not agent and not dist.is_initialized():
        # Process 0 keeps it: the group that begins below finds its server.
        store = arrival.meet(process, wait_s, partial(_open_store, process), interface_variable())
        if begin_watch:
            begin_watch(partial(arrival.share, store, process.rank))
    warnings.filterwarnings(
        "ignore", category=FutureWarning, message=".*all_gather_into_tensor.*|.*reduce_scatter_tensor.*"
    )
    try:
        deepspeed.init_distributed(dist_backend=_backend(), auto_mpi_discovery=False, verbose=False)
        index = device().index  # None on the CPU; elsewhere NCCL would guess it from the rank
        dist.barrier(device_ids=None if index is None else [index])
    except RuntimeError as error:
        if "Duplicate GPU" not in str(error):
            raise
        raise UserError(
            f"process {process.rank} on {socket.gethostname()} has the same accelerator as another process; "
            "start one process per accelerator"
        ) from None
    # On the CPU each process shares a buffer of 66 MiB with those on its machine, under a name that DeepSpeed never removes. Once
    # all have opened it the name can go: the memory itself then goes with the processes, however they end.
    name = "deepspeed_allreduce_buffer_{}_{MASTER_ADDR}_{MASTER_PORT}_{RANK}".format(os.getuid(), **os.environ)
    Path("/dev/shm", name).unlink(missing_ok=True)
    if begin_watch and store is None:
        begin_watch(from_process_0)


def _take_device(process: Process) -> None:
    """Compute on the accelerator of this process: the one of its number on its machine or, where the launcher lets each process
    see one alone, that one."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return
    index, count = process.local_rank, accelerator.device_count()
    (seen_by,) = accelerator.visible_devices_envs()[:1]
    if index and count == 1 and os.environ.get(seen_by):  # as srun --gpus-per-task=1 does
        index = 0
        for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):  # where DeepSpeed looks for the device's number
            if name in os.environ:
                os.environ[name] = "0"
    if index >= count:
        raise UserError(
            f"process {process.rank} is number {index + 1} on its machine, which has {count} accelerators; "
            "start one process per accelerator"
        )
    accelerator.set_device(index)


def make_deterministic(wanted: bool) -> None:
    """Have torch choose kernels that give the same bits each time, or let it choose the fastest. Before the first matrix product.

    Of attention's kernels that leaves the flash and the memory-efficient one, with the deterministic variants of their backward
    passes, and the plain one. An operation that has no such kernel raises. On the CPU nothing but a few scatters changes.
    Raises UserError for a CUBLAS_WORKSPACE_CONFIG under which cuBLAS is not deterministic.
    """
    if wanted:
        # cuBLAS's streams would share their workspace otherwise, in any order; read when the first product is computed.
        workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if workspace not in (":4096:8", ":16:8"):
            raise UserError(
                f"run.deterministic needs CUBLAS_WORKSPACE_CONFIG :4096:8 or :16:8; it is {workspace[:40]}, unset it"
            )
    if torch.are_deterministic_algorithms_enabled() != wanted:
        torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.deterministic = wanted
    # What is left unwritten, nobody reads: the engine's buckets alone are gigabytes to fill.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


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
            raise arrival.port_taken(port, error) from None


def _extensions() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions"))


def _check_compilation() -> None:
    folder = _extensions()
    for lock in (*folder.glob("*/lock"), *folder.glob("*/*/lock")):
        with contextlib.suppress(FileNotFoundError):
            minutes = (time.time() - lock.stat().st_mtime) / 60
            if minutes > _COMPILATION_MINUTES:
                raise UserError(
                    f"{lock} is {minutes:.0f} minutes old: a compilation was interrupted, and DeepSpeed would wait for it "
                    "for ever; remove that file"
                )


def stop_processes() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def device() -> torch.device:
    """Where this process computes."""
    return torch.device(get_accelerator().current_device_name())


def accelerator_name() -> str:
    """The device's name as torch gives it, such as cpu or NVIDIA A100."""
    accelerator = get_accelerator()
    name = getattr(getattr(torch, accelerator.device_name(), None), "get_device_name", None)
    return str(name()) if name else str(accelerator.device_name())


def _backend() -> str:
    return str(get_accelerator().communication_backend_name())


def interface_variable() -> str:
    """The environment variable that names the network interface to use: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME."""
    return f"{_backend().upper()}_SOCKET_IFNAME"


def _dtypes() -> list[str]:
    accelerator = get_accelerator()
    supported = {"fp32": True, "bf16": accelerator.is_bf16_supported(), "fp16": accelerator.is_fp16_supported()}
    return [name for name, ok in supported.items() if ok]


def check_dtype(dtype: str) -> None:
    """Refuse (UserError) a dtype that this accelerator cannot train in."""
    usable = _dtypes()
    if dtype not in usable:
        raise UserError(
            f"model.dtype {dtype} is not supported on {get_accelerator().device_name()}; use {', '.join(usable)}"
        )


def accelerator_facts() -> dict[str, Any]:
    """What this machine computes with: its accelerators' name and number, the backend between them, the dtypes to train in."""
    count = get_accelerator().device_count()
    return {"name": accelerator_name(), "count": count, "backend": _backend(), "dtypes": _dtypes()}


def compilation_facts() -> dict[str, Any]:
    """The operation that DeepSpeed compiles when a group begins (None: none), whether it has been, and what there is to do it.

    It is the only one: the optimizers are torch's own, on the host as well.
    """
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")  # as DeepSpeed's own torch backend asks for it
    name = builder.NAME if builder is not None and builder.is_compatible() else None
    compiled = bool(name) and any(next(_extensions().glob(f"{depth}{name}/{name}.so"), None) for depth in ("", "*/"))
    tools = {"compiler": os.environ.get("CXX", "c++"), "ninja": "ninja"}
    found = {tool: shutil.which(command) for tool, command in tools.items()}
    return {"operation": name, "compiled": compiled, "folder": str(_extensions()), **found}


def sum_over_processes(values: Tensor) -> Tensor:
    """Add a tensor (on this process's device) element by element over all processes, in place. Collective."""
    dist.all_reduce(values)
    return values


def max_over_processes(value: float) -> float:
    """The largest of one number per process. Collective."""
    held = torch.tensor([value], dtype=torch.float64, device=device())
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return float(held.item())


def largest_of_processes(values: Sequence[float | Tensor]) -> list[float]:
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


def numbers_of_processes(value: float) -> list[float]:
    """One number per process, in the order of their ranks. Collective."""
    mine = torch.tensor([value], dtype=torch.float64, device=device())
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, mine)
    return [float(held.item()) for held in theirs]


def bytes_of_processes(mine: Tensor) -> list[Tensor]:
    """One uint8 tensor (n,) per process, of one length, in the order of their ranks, on the host. Collective."""
    here = mine.to(device())
    theirs = [torch.empty_like(here) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, here)
    return [held.cpu() for held in theirs]


def from_process_0(value: Any) -> Any:
    """What process 0 gives, of what JSON can say; the others' value is ignored. Collective."""
    encoded = json.dumps(value).encode() if dist.get_rank() == 0 else b""
    size = torch.tensor([len(encoded)], dtype=torch.int64, device=device())
    dist.broadcast(size, src=0)
    held = torch.zeros(int(size.item()), dtype=torch.uint8, device=device())
    if dist.get_rank() == 0:
        held.copy_(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))
    dist.broadcast(held, src=0)
    return json.loads(bytes(held.tolist()))


def on_process_0(action: Callable[[], Any]) -> Any:
    """What an action returns that process 0 alone takes (as JSON can say it). A UserError in it, all raise. Collective."""
    answer = {}
    if dist.get_rank() == 0:
        try:
            answer = {"value": action()}
        except UserError as error:
            answer = {"mistake": str(error)}
    answer = from_process_0(answer)
    if "mistake" in answer:
        raise UserError(answer["mistake"])
    return answer["value"]


def bytes_from_process_0(tensor: Tensor | None, count: int) -> Tensor:  # -> (count,) uint8, on the host
    """Process 0's tensor; the others give None. Collective."""
    held = torch.empty(count, dtype=torch.uint8, device=device()) if tensor is None else tensor.to(device())
    dist.broadcast(held, src=0)
    return held.cpu()


def tensor_from_process_0(tensor: Tensor | None, count: int) -> Tensor:  # -> (count,), fp32, on the device
    """Process 0's tensor, flat; the others give None. Collective."""
    held = torch.empty(count, device=device()) if tensor is None else tensor.flatten().to(device(), torch.float32)
    dist.broadcast(held, src=0)
    return held


def texts_of_processes(text: str, size: int = 256) -> list[str]:
    """One text per process, in the order of their ranks; cut after `size` bytes. Collective. Nothing is pickled."""
    encoded = text.encode(errors="replace")[:size].ljust(size, b"\0")  # a host's name may be any bytes
    mine = torch.tensor(list(encoded), dtype=torch.uint8, device=device())
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, mine)
    return [bytes(held.tolist()).rstrip(b"\0").decode(errors="replace") for held in theirs]


def values_of_processes(value: Any) -> list[Any]:
    """One value per process, of what JSON can say, in the order of their ranks. Collective."""
    encoded = json.dumps(value)
    return [json.loads(text) for text in texts_of_processes(encoded, int(max_over_processes(len(encoded))))]


def time_collectives(size: int, rounds: int = 5) -> dict[str, float]:
    """Median seconds of an all-reduce and an all-gather of so many bytes per process, in the slowest process. Collective."""
    mine = torch.ones(size // 4, device=device())
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    reduce = _median_seconds(lambda: dist.all_reduce(mine), rounds)
    gather = _median_seconds(lambda: dist.all_gather(theirs, mine), rounds)
    return dict(zip(("all-reduce", "all-gather"), largest_of_processes([reduce, gather]), strict=True))


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


def peak_memory_bytes() -> int:
    """This process's peak: allocated device memory, or resident memory where the device is the CPU."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(accelerator.max_memory_allocated())

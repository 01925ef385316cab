"""The accelerator: what this process computes on, and what it can do. No device is named by hand."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from cola_ds.config.dtypes import DTYPES
from cola_ds.distributed.launcher import Process
from cola_ds.errors import UserError

_COMPILATION_MINUTES = 15
NETWORK_ERROR = torch.distributed.DistError
DEVICE_ERRORS = (torch.OutOfMemoryError, torch.AcceleratorError, NETWORK_ERROR)
"""What says that a device or the network has failed, not that something asked for is wrong; all are RuntimeErrors as well."""


def take_device(process: Process) -> None:
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


def _extensions() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions"))


def prepare_compilation() -> None:
    """Have DeepSpeed compile with the ninja of this interpreter's environment. Raises UserError for a lock that an interrupted
    compilation has left: DeepSpeed would wait for it for ever.

    On another node ssh starts processes (pdsh's, mpirun's) without that environment's PATH. They would find no ninja, or another
    one, which takes for outdated what the first has compiled: each would compile anew after the other, for a minute.
    """
    beside, path = os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)
    if beside not in path.split(os.pathsep) and os.access(os.path.join(beside, "ninja"), os.X_OK):
        os.environ["PATH"] = os.pathsep.join([beside, path])
    folder = _extensions()
    for lock in (*folder.glob("*/lock"), *folder.glob("*/*/lock")):
        with contextlib.suppress(FileNotFoundError):
            minutes = (time.time() - lock.stat().st_mtime) / 60
            if minutes > _COMPILATION_MINUTES:
                raise UserError(
                    f"{lock} is {minutes:.0f} minutes old: a compilation was interrupted, and DeepSpeed would wait for it "
                    "for ever; remove that file"
                )


def device() -> torch.device:
    """Where this process computes."""
    return torch.device(get_accelerator().current_device_name())


def kind() -> str:
    """torch's name of the kind of device, such as cpu or cuda; the device itself is not touched."""
    return str(get_accelerator().device_name())


def capability() -> tuple[int, int] | None:
    """The compute capability of this process's NVIDIA GPU; None where it computes on something else."""
    return torch.cuda.get_device_capability() if kind() == "cuda" and torch.version.cuda else None


def accelerator_name() -> str:
    """The device's name as torch gives it, such as cpu or NVIDIA A100."""
    accelerator = get_accelerator()
    name = getattr(getattr(torch, accelerator.device_name(), None), "get_device_name", None)
    return str(name()) if name else str(accelerator.device_name())


def backend() -> str:
    return str(get_accelerator().communication_backend_name())


def interface_variable() -> str:
    """The environment variable that names the network interface to use: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME."""
    return f"{backend().upper()}_SOCKET_IFNAME"


def _dtypes() -> list[str]:
    accelerator = get_accelerator()
    return [name for name in DTYPES if name == "fp32" or getattr(accelerator, f"is_{name}_supported")()]


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
    return {"name": accelerator_name(), "count": count, "backend": backend(), "dtypes": _dtypes()}


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


def memory_bytes(processes_here: int) -> tuple[int, int]:
    """What each of so many processes on this machine has: where it computes, and on its host. In full, not what is free: the
    same at each start."""
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    host = min([host, *(limit for limit, _ in memory_limits())]) // processes_here
    accelerator = get_accelerator()
    return (host if accelerator.device_name() == "cpu" else int(accelerator.total_memory())), host


def memory_limits() -> Iterator[tuple[int, int]]:
    """Limits of this process's control groups, in bytes, and what is used of each."""
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        root, limit, used = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        if controllers:  # version 1
            root, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        group = root / path.strip("/")
        for folder in (group, *group.parents) if controllers in ("", "memory") else ():
            with contextlib.suppress(OSError, ValueError):  # no such group; "max"
                yield int((folder / limit).read_bytes()), int((folder / used).read_bytes())


def peak_memory_bytes() -> int:
    """This process's peak: allocated device memory, or resident memory where the device is the CPU."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(accelerator.max_memory_allocated())

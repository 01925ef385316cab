"""Which process am I: started by the deepspeed launcher, torchrun, mpirun or srun, or alone.

Whatever started it, a process ends up with the variables that torch.distributed reads. Variables that are set already win.
"""

from __future__ import annotations

import os
import random
import re
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cola_ds.errors import UserError, first_line, quoted

_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Where DeepSpeed looks for the device's number first; `accelerator.take_device` may set it.
_CHANGED = (*_NAMES, "OMPI_COMM_WORLD_LOCAL_RANK")
_MOST_PROCESSES = 1_000_000
_ENDED_WITHIN_S = 3  # mpirun ends the others soon after the first that fails: where all do, one of them speaks


@dataclass(frozen=True)
class Process:
    """This process among those of the run."""

    rank: int
    local_rank: int
    world_size: int


def identify() -> Process:
    """Read what the launcher set; without any launcher, be a run of one process.

    Sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT where the launcher says the same by other names. Raises
    UserError when only some of them can be known, and for values that no launcher sets.
    """
    given = {name: os.environ[name] for name in _NAMES if os.environ.get(name)}
    # MASTER_* may linger in a shell; only RANK and WORLD_SIZE say that a launcher started this process.
    if not {"RANK", "WORLD_SIZE"} & given.keys():
        given = {**(_from_mpirun() or _from_srun() or _alone()), **given}
    missing = [name for name in _NAMES if name not in given]
    if missing:
        raise UserError(f"the launcher set some of {', '.join(_NAMES)}, but not {', '.join(missing)}")
    process = Process(*(_number(name, given[name], _MOST_PROCESSES) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    if process.rank >= process.world_size:
        raise UserError(
            f"RANK {process.rank} is not below WORLD_SIZE {process.world_size}, as a process's number is, from 0 on; let "
            "the launcher set them, or unset both"
        )
    if _number("MASTER_PORT", given["MASTER_PORT"], 2**16 - 1) == 0:
        raise UserError("MASTER_PORT 0 is no port that the processes could meet at; set one from 1 to 65535")
    if not re.fullmatch(r"[\w.:%\[\]-]+", address := given["MASTER_ADDR"]):
        raise UserError(f"MASTER_ADDR {quoted(address)} is no host's name or address; set that of process 0's machine")
    os.environ.update(given)
    return process


@contextmanager
def environment() -> Iterator[None]:
    """The variables that `identify` sets are after the block what they were before it: a process that goes on after a run is not
    taken for one that a launcher started."""
    before = {name: os.environ.get(name) for name in _CHANGED}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _number(name: str, text: str, most: int = 2**63) -> int:
    """What a launcher's variable says. Raises UserError that names it."""
    if not re.fullmatch(r"\s*[0-9]{1,20}\s*", text) or int(text) > most:
        limits = f"from 0 to {most}" if most < 2**63 else "from 0 on"
        raise UserError(
            f"{name} must be a whole number {limits}; it is {quoted(text)}: let the launcher set it, or unset it"
        )
    return int(text)


def _alone() -> dict[str, str]:
    return {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip


def allow_open_files(world_size: int) -> UserError | None:
    """Let process 0 have as many files open as connections to the others take, up to the hard limit; what is to be said where
    that is too low. Each other process has one to torch's store and one to the watch, and while they meet one more."""
    needed = 3 * world_size + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < needed:
        soft = needed if hard == unlimited else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == unlimited or soft >= 2 * world_size + 64:
        return None
    return UserError(
        f"process 0 of {world_size} needs some {needed} open files, and may have {hard}; raise the hard limit (ulimit -Hn), "
        "under Slurm that of slurmd"
    )


def free_port() -> int:
    """A port that is free at every address: another run's process may listen at one of them.

    By chance, of those that systems do not hand out by themselves: what asks for any port, as gloo does, gets none of these
    before it is taken.
    """
    for port in random.SystemRandom().sample(range(10_000, 20_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _from_mpirun() -> dict[str, str] | None:
    """Open MPI's own variables, or those of MPICH's and Intel MPI's hydra. They do not say where process 0 is: without
    MASTER_ADDR, that is known where all processes are on one machine, and asked for by mpi4py where they are on several."""
    for rank, local_rank, size, local_size in (
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),
    ):
        if rank in os.environ and local_rank in os.environ:
            found = {name: os.environ.get(key, "") for name, key in zip(_NAMES, (rank, local_rank, size), strict=False)}
            if os.environ.get(local_size) == found["WORLD_SIZE"]:
                found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_port_of(os.getppid()))}
            elif not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
                found |= _first_process_by_mpi(found["RANK"])
            return {name: value for name, value in found.items() if value}
    return None


def _first_process_by_mpi(rank: str) -> dict[str, str]:
    """The host name of process 0, and a port that is free there. Collective, over MPI, which is left again before this returns:
    a run that ends with a status of its own is then no failure of MPI."""
    try:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI

        MPI.Init()
    except (ImportError, RuntimeError) as error:
        if rank != "0":
            time.sleep(_ENDED_WITHIN_S)
        raise UserError(
            "mpirun started processes on several machines, and only MPI knows which is the first: "
            f"pip install 'cola_ds[mpi]' on all of them, or set MASTER_ADDR and MASTER_PORT ({first_line(error)})"
        ) from None
    said = bytearray(256)
    if rank == "0":
        with socket.socket() as probe:
            probe.bind(("", 0))
            address = f"{socket.gethostname()} {probe.getsockname()[1]}".encode()
        said[: len(address)] = address
    MPI.COMM_WORLD.Bcast(said, root=0)
    MPI.Finalize()
    host, port = said.rstrip(b"\0").decode().split()
    return {"MASTER_ADDR": host, "MASTER_PORT": port}


def slurmstepd() -> Callable[[], bool] | None:
    """Tells whether the daemon that started this task of a Slurm step still lives; None where none is to be seen.

    Without it nobody ends the task: not its time limit, not a cancellation.
    """
    pid = os.getppid()
    while pid > 1 and (stat := _stat(pid)) is not None:
        if stat[0].startswith("slurmstepd"):
            begun = stat[1][19]
            return lambda: (now := _stat(pid)) is not None and now[1][19] == begun and now[1][0] not in "ZX"
        pid = int(stat[1][1])
    return None


def _stat(pid: int) -> tuple[str, list[str]] | None:
    """A process's name, and the fields of /proc/PID/stat after it, from its state on; None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    head, _, tail = text.rpartition(")")
    return head.partition("(")[2], tail.split()


def _from_srun() -> dict[str, str] | None:
    """A task of a Slurm job step. In a batch script itself, outside srun, there is no step of this program."""
    if "SLURM_PROCID" not in os.environ or "SLURM_STEP_NUM_TASKS" not in os.environ:
        return None
    job_id, step_id = (_number(name, os.environ.get(name) or "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    job = job_id * 31 + step_id
    found = {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ.get("SLURM_LOCALID", ""),
        "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": first_host(os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")),
        "MASTER_PORT": str(_port_of(job)),
    }
    return {name: value for name, value in found.items() if value}


def _port_of(number: int) -> int:
    """A port that every process of a job derives alike, below those that systems hand out by themselves."""
    return 20000 + number % 10000


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list, such as a1 of "a1,b[2-3]" and rack-07-ib of "rack-[07-09,12]-ib,x"."""
    found = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else ""


def slurm_nodes(names: str) -> list[str]:
    """The nodes of a Slurm list such as "a1,b[2-3,07]-ib"; not those of one with several brackets in a name."""
    nodes: list[str] = []
    for before, numbers, after in re.findall(r"([^,\[\]]+)(?:\[([\d,-]+)\]([^,\[\]]*))?(?=,|$)", names):
        for part in filter(None, numbers.split(",")):
            first, _, last = part.partition("-")
            nodes += [f"{before}{n:0{len(first)}}{after}" for n in range(int(first), int(last or first) + 1)]
        nodes += [] if numbers else [before]
    return nodes

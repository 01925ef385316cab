"""Which process am I: started by the deepspeed launcher, torchrun, mpirun or srun, or alone.

Whatever started it, a process ends up with the variables that torch.distributed reads. Variables that are set already win.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass

from cola_ds.errors import UserError

_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Process:
    """This process among those of the run."""

    rank: int
    local_rank: int
    world_size: int


def identify() -> Process:
    """Read what the launcher set; without any launcher, be a run of one process.

    Sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT where the launcher says the same by other names. Raises
    UserError when only some of them can be known.
    """
    given = {name: os.environ[name] for name in _NAMES if os.environ.get(name)}
    # MASTER_* may linger in a shell; only RANK and WORLD_SIZE say that a launcher started this process.
    if not {"RANK", "WORLD_SIZE"} & given.keys():
        given = {**(_from_mpirun() or _from_srun() or _alone()), **given}
    missing = [name for name in _NAMES if name not in given]
    if missing:
        raise UserError(f"the launcher set some of {', '.join(_NAMES)}, but not {', '.join(missing)}")
    os.environ.update(given)
    try:
        return Process(*(int(given[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    except ValueError:
        raise UserError("RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers") from None


def _alone() -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _from_mpirun() -> dict[str, str] | None:
    """Open MPI's own variables, or those of MPICH's and Intel MPI's hydra. They do not say where process 0 is: without
    MASTER_ADDR, that is known where all processes are on one machine."""
    for rank, local_rank, size, local_size in (
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),
    ):
        if rank in os.environ and local_rank in os.environ:
            found = {name: os.environ.get(key, "") for name, key in zip(_NAMES, (rank, local_rank, size), strict=False)}
            if os.environ.get(local_size) == found["WORLD_SIZE"]:
                found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_port_of(os.getppid()))}
            return {name: value for name, value in found.items() if value}
    return None


def _from_srun() -> dict[str, str] | None:
    """A task of a Slurm job step. In a batch script itself, outside srun, there is no step of this program."""
    if "SLURM_PROCID" not in os.environ or "SLURM_STEP_NUM_TASKS" not in os.environ:
        return None
    job = int(os.environ.get("SLURM_JOB_ID", 0)) * 31 + int(os.environ.get("SLURM_STEP_ID", 0))
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

"""Which process am I: started by the `deepspeed` launcher or torchrun, or alone."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from cola_ds.errors import UserError


@dataclass(frozen=True)
class Process:
    """This process among those of the run."""

    rank: int
    local_rank: int
    world_size: int


def identify() -> Process:
    """Read the launcher's environment variables; without any, be a run of one process.

    Alone, the variables that torch.distributed wants are set. Raises UserError when only some of them are there.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    # MASTER_* may linger in a shell; only RANK and WORLD_SIZE say that a launcher started this process.
    if {"RANK", "WORLD_SIZE"} <= set(missing):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    elif missing:
        raise UserError(f"the launcher set some of {', '.join(names)}, but not {', '.join(missing)}")
    try:
        return Process(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    except ValueError:
        raise UserError("RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers") from None

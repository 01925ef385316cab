"""Runs in processes of their own, started as a user starts them, and how long their first step takes to come."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cola_ds.distributed.launcher import free_port
from tests.support.toys import REPOSITORY

_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class ArmFailedError(Exception):
    """An arm ended with another status than 0. Its message is the end of what it said."""


def timed_run(words: list[str], metrics: Path, log: Path) -> float:
    """Run `python WORDS` to its end, what it says in `log`. Returns the seconds until the first row stood in `metrics`."""
    env = {name: value for name, value in os.environ.items() if name not in _LAUNCHED}
    env |= {"HF_HUB_OFFLINE": "1", "MASTER_PORT": str(free_port())}
    first_step_s = math.nan
    begin = time.perf_counter()
    with open(log, "w", encoding="utf-8") as out:
        process = subprocess.Popen([sys.executable, *words], cwd=REPOSITORY, env=env, stdout=out, stderr=out)
        while process.poll() is None:
            if math.isnan(first_step_s) and metrics.exists() and metrics.stat().st_size:
                first_step_s = time.perf_counter() - begin
            time.sleep(0.02)
    if process.returncode:
        raise ArmFailedError(log.read_text(encoding="utf-8")[-4000:])
    return first_step_s


def torchrun(processes: int, *words: str) -> list[str]:
    """The words that start a module in so many processes."""
    port = ["--master_port", str(free_port())]
    return ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), *port, "-m", *words]


def json_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

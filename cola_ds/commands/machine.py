"""What a machine has that a run needs: each process looks at its own, and all judge what they found alike."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cola_ds.config.schema import RunConfig
from cola_ds.distributed import accelerator
from cola_ds.errors import first_line, some_of
from cola_ds.training.preflight import config_hashes, differences, versions

_LOOKS_UP_S = 10.0
OTHER_FOLDER = "name another folder (run.dir or --dir)"
# What each machine must have room in, how many bytes per process at least, and what helps.
_ROOM = {
    "folder": (2**30, OTHER_FOLDER),
    "temporary files": (2**28, "set TMPDIR to another folder"),
    "shared memory": (2**27, "mount a larger tmpfs there (containers: --shm-size)"),
    "memory": (2**30, "start fewer processes, or ask for more memory"),
}
Row = tuple[str, str, list[str], list[str]]
"""What was looked at, what was found, failures and warnings. Those end in a remedy; without any, it is ok."""


def look(config: RunConfig | None, engine_json: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What this process finds on its own machine, but for the compilation: that is looked at before the group begins."""
    mpi4py = "none"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        mpi4py = importlib.metadata.version("mpi4py")
    return {
        "host": socket.gethostname(),
        "versions": {**versions(), "mpi4py": mpi4py},
        "config": config_hashes(config, engine_json) if config else {},
        "accelerator": accelerator.accelerator_facts(),
        "folder": _room_in(folder),
        "temporary files": _room_in(Path(os.environ.get("TMPDIR") or "/tmp")),
        "shared memory": _room_in(Path("/dev/shm")),
        "memory": {"where": "available", "free": _free_memory(), "problem": ""},
    }


def _room_in(path: Path) -> dict[str, Any]:
    try:
        with tempfile.TemporaryFile(dir=path) as out:
            out.write(b"cola-ds")
        return {"where": str(path), "free": shutil.disk_usage(path).free, "problem": ""}
    except OSError as error:
        return {"where": str(path), "free": 0, "problem": error.strerror or first_line(error)}


def _free_memory() -> int:
    """What is available, or what this process's cgroups leave of their limits, if that is less."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min([free, *(limit - used for limit, used in accelerator.memory_limits())])


def address_of(host: str) -> str:
    """The address that a name leads to; empty where it leads nowhere."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return ""


def address_towards(host: str) -> str:
    """This machine's own address on the way to another; empty where there is none. Nothing is sent."""
    with contextlib.suppress(OSError):
        family, kind, _, _, there = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(there)
            return str(probe.getsockname()[0])
    return ""


def name_lookup_s(addresses: list[str]) -> float:
    """Seconds that the slowest of these addresses' names took; after so many in all, as far as they came.

    Asked as torch asks: its sockets speak IPv6, where an IPv4 address is ::ffff:ADDRESS, and a line of /etc/hosts with the bare
    address is none of that (torch 2.13, glibc 2.36).
    """
    slowest, since = 0.0, [0.0]

    def look_up() -> None:
        nonlocal slowest
        for address in addresses:
            since[0] = time.monotonic()
            with contextlib.suppress(OSError):  # one without a name is no worse
                socket.getnameinfo((address if ":" in address else f"::ffff:{address}", 0), 0)
            slowest = max(slowest, time.monotonic() - since[0])

    since[0] = time.monotonic()
    thread = threading.Thread(target=look_up, daemon=True)  # nothing ends a look-up but its own end
    thread.start()
    thread.join(_LOOKS_UP_S)
    return max(slowest, time.monotonic() - since[0]) if thread.is_alive() else slowest


def judge(everyone: list[dict[str, Any]], config: RunConfig | None) -> Iterator[Row]:
    """What is to be said of what each process has found, in the order of their ranks."""
    hosts = [theirs["host"] for theirs in everyone]
    for check in ("versions", "config"):
        facts = [theirs[check] for theirs in everyone]
        if facts[0]:
            found = ", ".join(f"{name} {value}" for name, value in facts[0].items())
            yield check, found, [f"{said}; make the nodes alike" for said in differences(facts, hosts)], []
    yield _judge_accelerators(everyone, hosts, config)
    yield _judge_compilation(everyone)
    for name, (least, remedy) in _ROOM.items():
        room = {theirs["host"]: theirs[name] for theirs in everyone}
        failures = [f"{on['where']} on {host}: {on['problem']}; {remedy}" for host, on in room.items() if on["problem"]]
        little = [host for host, on in room.items() if not on["problem"] and on["free"] < least * hosts.count(host)]
        host = min(room, key=lambda host: room[host]["free"])
        found = f"{room[host]['where']}: {room[host]['free'] / 2**30:.1f} GiB free on {host}, which has least"
        yield name, found, failures, [f"little on {some_of(little)}; {remedy}"] if little else []


def _judge_accelerators(everyone: list[dict[str, Any]], hosts: list[str], config: RunConfig | None) -> Row:
    dtype = config.model.dtype if config else "fp32"
    failures, idle, counts = [], [], []
    for host, on in {theirs["host"]: theirs["accelerator"] for theirs in everyone}.items():
        counts.append(f"{on['count']} on {host} for {hosts.count(host)} process(es)")
        if dtype not in on["dtypes"]:
            failures.append(f"no {dtype} on {host}; set model.dtype to one of {', '.join(on['dtypes'])}")
        if on["count"] > hosts.count(host):
            idle.append(f"{counts[-1]}; start one process per accelerator")
    first, kinds = everyone[0]["accelerator"], [{"accelerator": theirs["accelerator"]["name"]} for theirs in everyone]
    found = f"{first['name']}, {', '.join(first['dtypes'])}; {some_of(counts)}"
    return "accelerator", found, failures, differences(kinds, hosts) + idle


def _judge_compilation(everyone: list[dict[str, Any]]) -> Row:
    failures, first = [], everyone[0]["compilation"]
    for host, on in {theirs["host"]: theirs["compilation"] for theirs in everyone}.items():
        if on["operation"] and not on["ninja"]:
            failures.append(f"no ninja on {host}; activate the virtual environment, or pip install ninja")
        if on["operation"] and not on["compiled"] and not on["compiler"]:
            failures.append(f"no C++ compiler on {host}; install g++, or set CXX")
    state = f"{'compiled before' if first['compiled'] else 'not compiled before'}, in {first['folder']}"
    return "compilation", f"{first['operation']} {state}" if first["operation"] else "none", failures, []

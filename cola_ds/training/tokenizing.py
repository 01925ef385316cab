"""Tokenizing for all processes of a run: one process of each file system does it, and the others map what it has kept."""

from __future__ import annotations

import contextlib
import socket
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any

from cola_ds import notices
from cola_ds.config.schema import DataConfig, ModelConfig
from cola_ds.data.cache import HERE, cache_folder
from cola_ds.data.tokenize import Found, open_found, tokenize
from cola_ds.distributed import collectives, watchdog
from cola_ds.distributed.launcher import Process
from cola_ds.errors import UserError

_LOOKS_EVERY_S = 0.5


def tokenize_together(config: DataConfig, tokenizer: Any, model: ModelConfig, process: Process) -> Found:
    """What tokenize() gives, on every process. Collective.

    Raises UserError, on all processes, for what one of them finds wrong.
    """
    hosts = collectives.hosts()
    folder = cache_folder(config)
    leader = process.rank if folder is None else _leader(folder, process.rank, hosts)

    def work(progress: Callable[[int], None], share: int) -> Found:
        return tokenize(config, tokenizer, model, progress=progress, share=share)

    mine, answers = _all_do(
        work if leader == process.rank else None, process, 1 if folder else hosts.count(hosts[process.rank])
    )
    if mine is None:
        mine = _opened(answers[leader])
    if any(collectives.all_gather_numbers(float(mine is None))):
        again, _ = _all_do(work if mine is None else None, process, hosts.count(hosts[process.rank]))
        mine = mine or again
    watchdog.rest()  # what comes next, loading, may take longer than any step
    assert mine is not None
    return mine


def _opened(answer: dict[str, Any]) -> Found | None:
    """What the leader has kept; None where that is nothing, or not to be seen here: hosts of one name may have a folder each, and
    somebody may have removed it. Then this process does it for itself."""
    places = answer.get("places")
    try:
        return None if places is None else open_found(places, answer["warnings"])
    except UserError:
        return None


def _leader(folder: Path, rank: int, hosts: list[str]) -> int:
    """The process that tokenizes for this one: the first of those that see the same folder. Collective.

    The first process of each host leaves a file there, and looks whose it sees: to write one's own makes a network file system
    show the others'. Where nothing can be written each host has its own.
    """
    first = hosts.index(hosts[rank])
    run = collectives.broadcast_object(uuid.uuid4().hex)
    mine = folder / f"{HERE}-{run}-{rank}"
    if rank == first:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            mine.touch()
    collectives.all_gather_numbers(0.0)  # all are written
    seen = rank
    if rank == first:
        with contextlib.suppress(OSError):
            seen = min([rank, *(int(path.name.rpartition("-")[2]) for path in folder.glob(f"{HERE}-{run}-*"))])
    seers = [int(each) for each in collectives.all_gather_numbers(float(seen))]  # all have looked
    with contextlib.suppress(OSError):
        mine.unlink(missing_ok=True)
    return seers[first]


def _all_do(
    work: Callable[[Callable[[int], None], int], Found] | None, process: Process, share: int
) -> tuple[Found | None, list[dict[str, Any]]]:
    """What `work` finds, where this process has some; and where each process keeps it. Collective: all wait here, alive."""
    rows = 0

    def progress(done: int) -> None:
        nonlocal rows
        rows = done

    pool = ThreadPoolExecutor(1, thread_name_prefix="tokenizing")
    try:
        future: Future[Found] | None = pool.submit(work, progress, share) if work else None
        with notices.Progress("tokenizing", "row", shown=process.rank == 0) as told:
            while True:
                watchdog.heartbeat("tokenizing")
                if future is not None:
                    wait_for([future], timeout=_LOOKS_EVERY_S)
                if all(collectives.all_gather_numbers(float(future is None or future.done()))):
                    break
                told.at(rows)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    found, answer = _outcome(future)
    answers = collectives.all_gather_objects(answer)
    for rank, each in enumerate(answers):
        if "error" in each:
            where = "" if "error" in answers[0] else f" (process {rank} on {each['host']})"
            raise UserError(each["error"] + where)
    return found, answers


def _outcome(future: Future[Found] | None) -> tuple[Found | None, dict[str, Any]]:
    if future is None:
        return None, {}
    try:
        found = future.result()
    except UserError as error:
        return None, {"error": str(error), "host": socket.gethostname()}
    return found, {"places": found.places(), "warnings": found.warnings}

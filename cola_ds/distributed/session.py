"""A session: this process as one of a run's, for as long as a run called from Python takes, and then as it was before."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cola_ds import notices
from cola_ds.distributed import launcher, rendezvous, signals, watchdog
from cola_ds.distributed.deepspeed_internals import end_process
from cola_ds.distributed.launcher import Process
from cola_ds.errors import StoppedError, UserError, first_line

_busy = threading.Lock()
_launched = False


@contextmanager
def joined() -> Iterator[tuple[Process, Callable[[int], None]]]:
    """Which process this is, and what ends it; inside the block it listens to signals, in the main thread, and is watched.

    Afterwards handlers, the launcher's variables, watch and process group are what they were. What ends the process is called
    where another one of the run died or hangs: a collective that waits for it cannot be left. Raises UserError where a run goes
    on in this process already, a process group has begun that is not a run's, or a launcher's process has had its run.
    """
    if not _busy.acquire(blocking=False):
        raise UserError("a run goes on in another thread of this process; wait until it has ended")
    try:
        with launcher.environment():
            yield from _joined(launcher.identify())
    finally:
        _busy.release()


def _joined(process: Process) -> Iterator[tuple[Process, Callable[[int], None]]]:
    global _launched
    if _group_has_begun():
        raise UserError(
            "torch.distributed has begun in this process, and a run has a group of its own; destroy that first"
        )
    if _launched:
        raise UserError(
            "this process has had its run; a launcher's processes take part in one: start the launcher again"
        )
    _launched = process.world_size > 1
    if process.world_size == 1 and not rendezvous.by_agent():  # torch's store of a run before keeps its own
        os.environ["MASTER_PORT"] = str(launcher.free_port())
    listens = threading.current_thread() is threading.main_thread()
    if listens:
        signals.listen(lambda message: notices.notice(f"process {process.rank}: {message}"), signals.interrupt)
    status = 0
    try:
        rendezvous.begin(process, end_process)
        yield process, end_process
    except BaseException as error:
        status = 2 if isinstance(error, UserError) else 75 if isinstance(error, StoppedError) else 3
        if process.rank == 0:  # who called sees it anyway
            notices.unsaid(f"cola-ds: {type(error).__name__}: {first_line(error)}")
        raise
    finally:
        signals.finished()
        watchdog.leave(status)
        if _group_has_begun():
            from cola_ds.distributed import collectives

            collectives.destroy_process_group()
        watchdog.stop()
        rendezvous.stop()
        notices.end_log()
        if listens:
            signals.restore()


def _group_has_begun() -> bool:
    """Without an import of torch, which takes seconds."""
    if "torch" not in sys.modules:
        return False
    import torch.distributed

    return torch.distributed.is_available() and torch.distributed.is_initialized()

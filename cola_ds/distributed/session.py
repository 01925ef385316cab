"""A session: this process as one of a run's, for as long as a run called from Python takes, and then as it was before."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cola_ds.distributed import launcher, rendezvous, signals, watchdog
from cola_ds.distributed.deepspeed_internals import end_process
from cola_ds.distributed.launcher import Process
from cola_ds.errors import StoppedError, UserError


@contextmanager
def joined() -> Iterator[tuple[Process, Callable[[int], None]]]:
    """Which process this is, and what ends it; inside the block it listens to signals, in the main thread, and is watched.

    Afterwards handlers, environment, watch and process group are what they were. What ends the process is called where another
    one of the run died or hangs: a collective that waits for it cannot be left.
    """
    with launcher.environment():
        process = launcher.identify()
        listens = threading.current_thread() is threading.main_thread()
        if listens:
            signals.listen(
                lambda message: print(f"cola-ds: process {process.rank}: {message}", file=sys.stderr), signals.interrupt
            )
        status = 0
        try:
            rendezvous.begin(process, end_process)
            yield process, end_process
        except BaseException as error:
            status = 2 if isinstance(error, UserError) else 75 if isinstance(error, StoppedError) else 3
            raise
        finally:
            signals.finished()
            watchdog.leave(status)
            _leave_group()
            watchdog.stop()
            rendezvous.stop()
            if listens:
                signals.restore()


def _leave_group() -> None:
    """Where one has begun: torch and deepspeed are not imported for that."""
    if "deepspeed" in sys.modules:
        from cola_ds.distributed import collectives

        collectives.destroy_process_group()

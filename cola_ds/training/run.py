"""Running a prepared config: from its checks to a finished run folder."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from cola_ds import notices
from cola_ds.checkpoint.decide import ResumeOptions
from cola_ds.distributed import signals
from cola_ds.distributed.engine import free_engine
from cola_ds.distributed.launcher import Process
from cola_ds.evaluation.attention import attention_of
from cola_ds.run.folder import RunDir
from cola_ds.run.lock import RunLock
from cola_ds.run.log import RunLog, add_error
from cola_ds.training.loop import run_chain
from cola_ds.training.preflight import check_ranks_agree
from cola_ds.training.prepared import Prepared
from cola_ds.training.proofs import prove
from cola_ds.training.result import finish
from cola_ds.training.start import begin, lock_and_choose
from cola_ds.training.validation import evaluate
from cola_ds.training.watch import watch_if_due


def run_prepared(prepared: Prepared, process: Process, options: ResumeOptions, frees: bool = False) -> bool:
    """Run the prepared config, or what is left of it, and write its folder; whether there was anything to do. Collective, in a
    process group that has begun. With `frees`, engine and model are gone afterwards: the process has other things to do.

    Raises UserError for processes that disagree, a folder that holds another run or cannot be written; TrainingFailedError for
    losses, gradients or adapters that are not finite; StoppedError when a signal asked for it.
    """
    since = time.perf_counter()
    folder = RunDir(prepared.config.run.dir) if process.rank == 0 else None
    lock = RunLock(folder.path) if folder else None
    chain = None
    try:
        check_ranks_agree(prepared)
        start = lock_and_choose(prepared, process, folder, lock, options)
        if start.finished:
            return False
        path = Path(prepared.config.run.dir)
        notices.keep_errors_in(lambda text: add_error(path, process.rank, text))
        chain = begin(prepared, process, folder, start, since)
        if folder:
            notices.keep_in(RunLog(folder, process.world_size).add)
        loading_s = time.perf_counter() - since
        prove(chain, prepared)
        if folder:
            folder.add_to_environment(
                {
                    "attention": attention_of(chain.engine.module),
                    "kernels": "liger" if prepared.kernels else "torch",
                }
            )
        signals.steps_begin()
        if prepared.config.trains:
            run_chain(chain)
        else:
            evaluate(chain)
            watch_if_due(chain)
        finish(chain, prepared, loading_s)
        if frees:
            free_engine(chain.engine)
        return True
    except BaseException:
        if frees and chain:
            with contextlib.suppress(Exception):  # an engine in the middle of a step may lack what an idle one has
                free_engine(chain.engine)
        raise
    finally:
        if chain:
            chain.logger.close()  # what is said of an error gets a line of its own
            chain.engine = None if frees else chain.engine
        if lock:
            lock.release()

"""Writing a checkpoint of a running chain: what is gathered from all processes, and what happens where the disk is full."""

from __future__ import annotations

import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

from cola_ds.checkpoint.format import Counters, Rows, SavedState, Unlogged
from cola_ds.checkpoint.shards import shard_files
from cola_ds.checkpoint.store import CheckpointFolder, CheckpointWriter, write_shards
from cola_ds.config.dtypes import DTYPES
from cola_ds.config.schema import RunConfig
from cola_ds.distributed import collectives, signals, watchdog
from cola_ds.distributed.engine_state import (
    loss_scale_state,
    optimizer_scalars,
    own_parts,
    random_state,
    state_kinds,
    trained_tensors,
)
from cola_ds.distributed.nodes import check_alike
from cola_ds.errors import StoppedError, TrainingFailedError
from cola_ds.lora.layers import frozen_factors
from cola_ds.lora.starts import frozen_tensors
from cola_ds.training.state import Chain, RunFacts, counters, position

_RANDOM_STATE = 2**13  # bytes
_PLACE = 2**9  # bytes, at most, by which a shard file says where a tensor in it lies


def checkpoint_is_due(chain: Chain) -> bool:
    """Every so many steps, and before the last knot: what follows it, an evaluation say, may take long."""
    step, every = chain.state.step, chain.config.checkpoint.every_steps
    return step == chain.step_plan.total_steps or (every is not None and step % every == 0)


def save_checkpoint(chain: Chain) -> bool:
    """Write a checkpoint; whether it was written. Raises TrainingFailedError when it could not be, if the config says so."""
    watchdog.heartbeat("checkpoint")
    chain.logger.stop_clock()
    if not chain.config.trains_lora:
        watchdog.rest()  # a whole model takes as long as it takes
    wrong = save_chain(chain)
    chain.logger.restart_clock()
    if wrong is None:
        return True
    chain.logger.warn(f"no checkpoint at step {chain.state.step}: {wrong}")
    if chain.config.checkpoint.on_error == "stop":
        raise TrainingFailedError(f"no checkpoint could be written at step {chain.state.step}: {wrong}")
    return False


def stop_signal() -> int:
    """The signal that has asked some process to stop; 0: none. One answer for all: collective."""
    return int(collectives.all_reduce_max([signals.requested()])[0])


def stop_is_asked() -> bool:
    """Whether there is one: what an evaluation asks between its batches. Collective."""
    return stop_signal() > 0


def can_stop_here(chain: Chain) -> bool:
    """Whether there is something to go on from, or can be: with nothing left to tie, the checkpoint before the last knot.
    Collective."""
    if chain.state.link <= chain.links or not chain.config.trains:
        return True
    return bool(
        collectives.broadcast_object(
            chain.folder is not None and CheckpointFolder(chain.folder).at(chain.state.step).exists()
        )
    )


def stop_here(chain: Chain, signum: int) -> None:
    """Write a checkpoint and raise StoppedError."""
    name, step = signal.Signals(signum).name, chain.state.step
    if not chain.config.trains:
        raise StoppedError(f"stopped on {name}")
    written = can_stop_here(chain) if chain.state.link > chain.links else save_checkpoint(chain)
    if not written:
        raise TrainingFailedError(f"stopped on {name} at step {step}, but no checkpoint could be written there")
    chain.logger.event("stopped", **position(chain), signal=name)
    # Nobody leaves before it is written: a launcher, and the watch, end those who are still here then.
    collectives.broadcast_object(None)
    raise StoppedError(f"stopped on {name} after step {step}, with a checkpoint")


def save_chain(chain: Chain) -> str | None:
    """Write a checkpoint of the chain as it is. Collective. Returns what was wrong, if it could not be written; nothing else is
    changed then. One that is there for this step already, and verifies, stands: it leads to the same bits.
    """
    step, begin = chain.state.step, time.perf_counter()
    if chain.in_nodes:
        check_alike(chain.engine.module, frozen_factors(chain.engine.module).values(), step)
    checkpoints = CheckpointFolder(chain.folder) if chain.folder else None
    if collectives.broadcast_object(
        checkpoints is None or chain.facts is None or checkpoints.sound(checkpoints.at(step))
    ):
        return None
    attempt = _Attempt(checkpoints, step) if checkpoints else None
    if attempt:
        attempt.do(lambda writer: _add_links(chain, writer))
        attempt.do(lambda writer: chain.folder.flush_rows() if chain.folder else None)
    if chain.config.method == "full":
        _add_shards(chain, attempt)
    else:
        for piece in trained_tensors(chain.engine):
            if attempt and piece:
                attempt.do(lambda writer, piece=piece: writer.add_trained(piece))
        if attempt and (frozen := frozen_tensors(chain.engine.module)):
            attempt.do(lambda writer: writer.add_trained(frozen))
    random_states = collectives.all_gather_bytes(random_state())
    unlogged = chain.logger.state()
    if attempt and checkpoints and chain.facts:
        state = _state(chain, chain.facts, unlogged)
        attempt.do(lambda writer: attempt.note(writer.finish(state, random_states)))
        attempt.do(lambda _: checkpoints.tidy(step, chain.config.checkpoint.keep, chain.state.best_step))
        attempt.clean_up()
        if attempt.wrong is None:
            chain.logger.event("checkpoint", step=step, bytes=attempt.size, seconds=time.perf_counter() - begin)
        else:
            chain.logger.event("checkpoint failed", step=step, reason=attempt.wrong)
    return collectives.broadcast_object(attempt.wrong if attempt else None)


class _Attempt:
    """A checkpoint on its way, until the first error: from then on nothing more is written."""

    def __init__(self, checkpoints: CheckpointFolder, step: int):
        self.wrong: str | None = None
        self.size = 0
        self._writer: CheckpointWriter | None = None
        self._path = checkpoints.path
        try:
            self._writer = CheckpointWriter(checkpoints, step)
        except OSError as error:
            self.wrong = _explain(self._path, error)

    @property
    def scratch(self) -> str | None:
        """The name of the folder that is written into, while nothing has gone wrong."""
        return self._writer.scratch.name if self._writer and self.wrong is None else None

    def fail(self, wrong: str) -> None:
        """What another process could not do."""
        self.wrong = self.wrong or wrong

    def do(self, action: Any) -> None:
        if self._writer is None or self.wrong is not None:
            return
        try:
            action(self._writer)
        except OSError as error:
            self.wrong = _explain(self._path, error)

    def note(self, size: int) -> None:
        self.size = size

    def clean_up(self) -> None:
        if self._writer and self.wrong is not None:
            self._writer.abandon()


def _explain(path: Path, error: OSError) -> str:
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    return f"{error.strerror or error} ({path}, {free / 2**20:,.1f} MiB free); the checkpoints before it stay"


def _add_shards(chain: Chain, attempt: _Attempt | None) -> None:
    """Have every process write what it keeps, into the folder that process 0 has made: no weight goes to another process, and one
    that cannot write ends the attempt of all. Collective."""
    scratch = collectives.broadcast_object(attempt.scratch if attempt else None)
    if scratch is None:
        return
    path, rank, host = Path(chain.config.run.dir) / "checkpoints", chain.train.rank, socket.gethostname()
    files, wrong = {}, None
    try:
        kinds = state_kinds(chain.engine)
        files = write_shards(path / scratch, shard_files(rank, own_parts(chain.engine, kinds), kinds))
    except OSError as error:
        wrong = f"process {rank} on {host}: {_explain(path, error)}"
    for theirs, went_wrong in collectives.all_gather_objects([files, wrong]):
        if attempt and went_wrong:
            attempt.fail(went_wrong)
        elif attempt:
            attempt.do(lambda writer, theirs=theirs: writer.add_files(theirs))


def _add_links(chain: Chain, writer: CheckpointWriter) -> None:
    assert chain.folder is not None
    for link in range(1, chain.state.link):
        path = chain.folder.link_path(link) / "adapter_model.safetensors"
        writer.add_link(link, path, chain.state.link_hashes[link - 1])


def _state(chain: Chain, facts: RunFacts, unlogged: dict[str, Any]) -> SavedState:
    assert chain.folder is not None
    return SavedState(
        config=facts.config.model_dump(mode="json"),
        engine=facts.identity.engine,
        model=facts.model,
        train=facts.identity.train,
        eval=facts.identity.eval,
        watch=facts.identity.watch,
        base_links=facts.base_links,
        versions=facts.versions,
        world_size=chain.world_size,
        knots=list(chain.step_plan.knots),
        chain=Counters(**counters(chain.state)),
        scalars=optimizer_scalars(chain.engine),
        loss_scale=loss_scale_state(chain.engine),
        journal=Unlogged(**unlogged),
        rows=Rows(**chain.folder.row_counts()),
        elapsed_s=facts.elapsed_s + time.perf_counter() - facts.since,
    )


def space_needed(
    config: RunConfig, trained: list[int], weights: int, world_size: int, tied: list[int] | None = None, frozen: int = 0
) -> int:
    """Bytes that a run's links and checkpoints can take together; `trained` are the elements that each link trains, `tied` those
    that it has when it is saved (None: the same), `frozen` the most of them that it does not train; `weights` the model's
    parameters.

    The newest `checkpoint.keep`, the best, and one on its way, with Adam's two moments and every tied link in each of them; and
    what each process adds: its random state, and with method full the headers of its shard files.
    """
    element_bytes = DTYPES[config.model.dtype].element_bytes
    links = sum(tied or trained) * element_bytes if config.trains_lora else 0
    each = _RANDOM_STATE + (3 * weights * _PLACE if config.method == "full" else 0)
    return (config.checkpoint.keep + 2) * (
        12 * max(trained) + frozen * element_bytes + links + 2**17 + world_size * each
    ) + links

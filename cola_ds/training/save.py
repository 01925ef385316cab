"""Writing a checkpoint of a running chain: what is gathered from all processes, and what happens where the disk is full."""

from __future__ import annotations

import shutil
import signal
import time
from typing import Any

from cola_ds.checkpoint.format import Counters, Rows, SavedState, Unlogged
from cola_ds.checkpoint.store import CheckpointFolder, CheckpointWriter
from cola_ds.config.dtypes import DTYPES
from cola_ds.config.schema import RunConfig
from cola_ds.distributed import collectives, watchdog
from cola_ds.distributed.engine_state import loss_scale_state, optimizer_scalars, random_state, trained_tensors
from cola_ds.distributed.nodes import check_alike
from cola_ds.errors import StoppedError, TrainingFailedError
from cola_ds.training.state import Chain, RunFacts, counters, position


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
    chain.logger.say(f"warning: no checkpoint at step {chain.state.step}: {wrong}")
    if chain.config.checkpoint.on_error == "stop":
        raise TrainingFailedError(f"no checkpoint could be written at step {chain.state.step}: {wrong}")
    return False


def stop_here(chain: Chain, signum: int) -> None:
    """Write a checkpoint and raise StoppedError."""
    name, step = signal.Signals(signum).name, chain.state.step
    if not chain.config.trains:
        raise StoppedError(f"stopped on {name}")
    if chain.state.link > chain.links:  # nothing is left to tie: the checkpoint before the last knot stands
        written = collectives.broadcast_object(
            chain.folder is not None and CheckpointFolder(chain.folder).at(step).exists()
        )
    else:
        written = save_checkpoint(chain)
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
        check_alike(chain.engine.module, step)
    checkpoints = CheckpointFolder(chain.folder) if chain.folder else None
    if collectives.broadcast_object(
        checkpoints is None or chain.facts is None or checkpoints.sound(checkpoints.at(step))
    ):
        return None
    attempt = _Attempt(checkpoints, step) if checkpoints else None
    if attempt:
        attempt.do(lambda writer: _add_links(chain, writer))
        attempt.do(lambda writer: chain.folder.flush_rows() if chain.folder else None)
    for piece in trained_tensors(chain.engine):
        if attempt and piece:
            attempt.do(lambda writer, piece=piece: writer.add_trained(piece))
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
            self.wrong = self._explain(error)

    def do(self, action: Any) -> None:
        if self._writer is None or self.wrong is not None:
            return
        try:
            action(self._writer)
        except OSError as error:
            self.wrong = self._explain(error)

    def note(self, size: int) -> None:
        self.size = size

    def clean_up(self) -> None:
        if self._writer and self.wrong is not None:
            self._writer.abandon()

    def _explain(self, error: OSError) -> str:
        there = next(path for path in (self._path, *self._path.parents) if path.exists())
        free = shutil.disk_usage(there).free
        return f"{error.strerror or error} ({self._path}, {free / 2**20:,.1f} MiB free); the checkpoints before it stay"


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


def space_needed(config: RunConfig, trained: list[int]) -> int:
    """Bytes that a run's links and checkpoints can take together; `trained` are the elements that each link trains.

    The newest `checkpoint.keep`, the best, and one on its way, with Adam's two moments and every tied link in each of them.
    """
    links = sum(trained) * DTYPES[config.model.dtype].element_bytes if config.trains_lora else 0
    return (config.checkpoint.keep + 2) * (12 * max(trained) + links + 2**17) + links

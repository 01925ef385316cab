"""Writing a checkpoint of a running chain: what is gathered from all processes, and what happens where the disk is full."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from dataclasses import dataclass
from typing import Any

from cola_ds import processes, zero
from cola_ds.chain import Chain, ChainState
from cola_ds.checkpoint import CheckpointFolder, CheckpointWriter, Counters, Rows, SavedState, Unlogged
from cola_ds.config import RunConfig
from cola_ds.resume import Identity


@dataclass(frozen=True)
class Constant:
    """What every checkpoint of a run says alike. On process 0 alone."""

    config: RunConfig
    identity: Identity
    model: str
    """The base model's fingerprint."""
    versions: dict[str, str]
    elapsed_s: float
    """Seconds that earlier starts of the run took."""
    since: float
    """When this start began (time.perf_counter)."""


def save_chain(chain: Chain, constant: Constant | None) -> str | None:
    """Write a checkpoint of the chain as it is. Collective. Returns what was wrong, if it could not be written; nothing else is
    changed then. One that is there for this step already, and verifies, stands: it leads to the same bits.
    """
    step, begin = chain.state.step, time.perf_counter()
    checkpoints = CheckpointFolder(chain.folder) if chain.folder else None
    if processes.from_process_0(checkpoints is not None and checkpoints.sound(checkpoints.at(step))):
        return None
    attempt = _Attempt(checkpoints, step) if checkpoints else None
    if attempt:
        attempt.do(lambda writer: _add_links(chain, writer))
        attempt.do(lambda writer: chain.folder.flush_rows() if chain.folder else None)
    for piece in zero.trained_tensors(chain.engine):
        if attempt and piece:
            attempt.do(lambda writer, piece=piece: writer.add_trained(piece))
    random_states = processes.bytes_of_processes(zero.random_state())
    journal = chain.journal.state()
    if attempt and checkpoints and constant:
        state = _state(chain, constant, journal)
        attempt.do(lambda writer: attempt.note(writer.finish(state, random_states)))
        attempt.do(lambda _: checkpoints.tidy(step, chain.config.checkpoint.keep, chain.state.best_step))
        attempt.clean_up()
        if attempt.wrong is None:
            chain.journal.event("checkpoint", step=step, bytes=attempt.size, seconds=time.perf_counter() - begin)
        else:
            chain.journal.event("checkpoint failed", step=step, reason=attempt.wrong)
    return processes.from_process_0(attempt.wrong if attempt else None)


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


def _state(chain: Chain, constant: Constant, journal: dict[str, Any]) -> SavedState:
    assert chain.folder is not None
    return SavedState(
        config=constant.config.model_dump(mode="json"),
        engine=constant.identity.engine,
        model=constant.model,
        train=constant.identity.train,
        eval=constant.identity.eval,
        versions=constant.versions,
        world_size=chain.world_size,
        knots=list(chain.timetable.knots),
        chain=Counters(**counters(chain.state)),
        scalars=zero.optimizer_scalars(chain.engine),
        loss_scale=zero.loss_scale_state(chain.engine),
        journal=Unlogged(**journal),
        rows=Rows(**chain.folder.row_counts()),
        elapsed_s=constant.elapsed_s + time.perf_counter() - constant.since,
    )


def counters(state: ChainState) -> dict[str, Any]:
    """A chain's state as JSON can say it: without the remainders, which tying the links again gives back."""
    found = {
        field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "remainders"
    }
    return {name: None if value == math.inf else value for name, value in found.items()}


def from_counters(found: Counters) -> ChainState:
    """What `counters` was given."""
    known = found.model_dump()
    return ChainState(**{**known, "best": math.inf if found.best is None else found.best})


def space_needed(config: RunConfig, trained: list[int]) -> int:
    """Bytes that a run's links and checkpoints can take together; `trained` are the elements that each link trains.

    The newest `checkpoint.keep`, the best, and one on its way, with Adam's two moments and every tied link in each of them.
    """
    stored = 4 if config.model.dtype == "fp32" else 2
    links = sum(trained) * stored if config.trains_lora else 0
    return (config.checkpoint.keep + 2) * (12 * max(trained) + links + 2**17) + links

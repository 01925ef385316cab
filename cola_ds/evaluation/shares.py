"""Shares: examples divided among all processes (data parallel), each process with its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from cola_ds.data.batcher import batches_by_length
from cola_ds.distributed import accelerator, collectives, watchdog
from cola_ds.distributed.engine import Engine, evaluating

Result = TypeVar("Result")


def over_shares(
    engine: Engine,
    lengths: list[int],
    batch_size: int,
    stop: Callable[[], bool],
    work: Callable[[list[int]], list[Result]],
) -> dict[int, Result] | None:
    """What `work` makes of this process's examples, by index; every process calls it as often, if need be without any.
    Collective. None if `stop`, asked before each batch, says so.

    Of the longest it is given `batch_size` at once, of shorter ones as many as have no more positions (`lengths`)."""
    found: dict[int, Result] = {}
    with evaluating(engine):
        for batch in batches_by_length(lengths, batch_size, engine.world_size):
            if stop():
                return None
            watchdog.heartbeat("evaluation")
            mine = batch[engine.global_rank :: engine.world_size]
            found.update(zip(mine, work(mine), strict=True))
    return found


def total(numbers: Iterable[float]) -> float:
    """The sum of one number an example over the examples of all processes, in fp64. Collective."""
    mine = torch.tensor(math.fsum(numbers), dtype=torch.float64, device=accelerator.device())
    return float(collectives.all_reduce_sum(mine).item())

"""Batcher: which examples a step sees, and which process has them.

A step's examples follow from (seed, step) alone: every process knows them all, at every world size, without a message.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import numpy

from cola_ds.config.steps import Epochs
from cola_ds.data.batch import AnyBatch, Dataset, PackableDataset, StepExamples
from cola_ds.data.order import Order


def batches_by_length(lengths: Sequence[int] | numpy.ndarray, batch_size: int, world_size: int) -> Iterator[list[int]]:
    """Batches of all examples, for all processes together: 0-based indices, the longest first. `lengths` are in positions.

    The first has `batch_size` rows a process; the others as many as take no more positions, padded: what is short needs few
    passes, and none of them more memory than the first.
    """
    order = numpy.argsort(lengths, kind="stable")[::-1].tolist()  # of like length together: less padding, less waiting
    start = 0
    while start < len(order):
        rows = batch_size * int(lengths[order[0]]) // max(1, int(lengths[order[start]]))
        yield order[start : start + rows * world_size]
        start += rows * world_size


class Batcher:
    """Batches of a dataset for one process among `world_size`, in the given order of its examples; None: every example is a row,
    once an epoch.

    Where `joined`, the examples of a micro batch are laid end to end in one row, for attention that takes each by itself; where
    `fixed` as well, the row of every micro batch of a step is padded to one length, for compiled blocks.
    """

    def __init__(
        self,
        data: Dataset,
        rank: int,
        world_size: int,
        order: Order | None = None,
        joined: bool = False,
        fixed: bool = False,
    ):
        self.data, self.rank, self.world_size, self.joined = data, rank, world_size, joined
        self.order = order or Order(data.lengths)
        self._longest = (self.order.capacity or int(max(data.lengths))) if fixed else None
        self._epochs: tuple[tuple[int, int], Epochs] | None = None

    def step(self, step: int, seed: int, global_batch_size: int, micro_batch_size: int) -> StepExamples:
        """The examples of the step with 0-based index `step`: `global_batch_size` rows, or what is left of its epoch."""
        epoch, index = self._epochs_of(seed, global_batch_size).locate(step)
        rows = self.order.rows(seed, epoch).between(index * global_batch_size, (index + 1) * global_batch_size)
        micro_steps = global_batch_size // (micro_batch_size * self.world_size)
        longest = self._longest
        padded_to = None if longest is None else (micro_batch_size * longest, longest)
        return self._share(
            rows, micro_batch_size, micro_steps, is_packed=self.order.capacity is not None, padded_to=padded_to
        )

    def evaluation(self, batch_size: int) -> Iterator[StepExamples]:
        """Every example once, a row each, in batches of `batch_size` per process, or of more that are shorter."""
        for indices in batches_by_length(self.data.lengths, batch_size, self.world_size):
            yield self._share(
                [[index] for index in indices], -(-len(indices) // self.world_size), micro_steps=1, is_packed=False
            )

    def _epochs_of(self, seed: int, global_batch_size: int) -> Epochs:
        if self._epochs is None or self._epochs[0] != (seed, global_batch_size):
            order = self.order
            rows = order.count(seed, 0) if order.is_even else lambda epoch: order.count(seed, epoch)
            self._epochs = ((seed, global_batch_size), Epochs(rows, global_batch_size))
        return self._epochs[1]

    def _share(
        self,
        rows: list[list[int]],
        micro_batch_size: int,
        micro_steps: int,
        is_packed: bool,
        padded_to: tuple[int, int] | None = None,
    ) -> StepExamples:
        # Rows of like work run together: less padding, and processes that wait less for each other. The order inside a step
        # changes nothing in its sum.
        rows = sorted(rows, key=self._work)
        width = micro_batch_size * self.world_size
        mine = [rows[m * width : (m + 1) * width][self.rank :: self.world_size] for m in range(micro_steps)]
        chosen = [index for row in rows for index in row]
        lengths = [int(self.data.lengths[i]) for i in chosen]
        return StepExamples(
            micro_batches=[self._collate(each, is_packed, padded_to) for each in mine],
            examples=len(chosen),
            tokens=sum(lengths),
            loss_tokens=sum(int(self.data.loss_tokens[i]) for i in chosen),
            predictions=sum(int(self.data.predictions[i]) for i in chosen),
            indices=chosen,
            lengths=lengths,
        )

    def _work(self, row: Sequence[int]) -> tuple[int, int]:
        """The work of a row: its tokens and, since packed rows have nearly one number of these, what attention makes of them."""
        lengths = [int(self.data.lengths[i]) for i in row]
        return sum(lengths), sum(length * length for length in lengths)

    def _collate(self, rows: list[list[int]], is_packed: bool, padded_to: tuple[int, int] | None) -> AnyBatch:
        if self.joined:
            one_row = [index for row in rows for index in row]
            return cast(PackableDataset, self.data).collate_packed([one_row] if rows else [], padded_to)
        if is_packed:
            return cast(PackableDataset, self.data).collate_packed(rows)
        return self.data.collate([index for row in rows for index in row])

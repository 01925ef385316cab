"""Batcher: which examples a step sees.

A step's examples follow from (seed, step) alone: every process knows them all, at every world size, without a message.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cola_ds.data.batch import Dataset, StepExamples


class Batcher:
    """Batches of a dataset for one process among `world_size`."""

    def __init__(self, data: Dataset, rank: int, world_size: int):
        self.data, self.rank, self.world_size = data, rank, world_size
        self._order: tuple[tuple[int, int], list[int]] | None = None

    def step(self, step: int, seed: int, global_batch_size: int, micro_batch_size: int) -> StepExamples:
        """The examples of the step with 0-based index `step`: each epoch is a fresh permutation, its last batch may be short."""
        epoch, index = divmod(step, -(-len(self.data) // global_batch_size))
        if self._order is None or self._order[0] != (seed, epoch):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            self._order = ((seed, epoch), torch.randperm(len(self.data), generator=generator).tolist())
        chosen = self._order[1][index * global_batch_size : (index + 1) * global_batch_size]
        return self._share(
            chosen, micro_batch_size, micro_steps=global_batch_size // (micro_batch_size * self.world_size)
        )

    def evaluation(self, batch_size: int) -> Iterator[StepExamples]:
        """Every example once, in batches of `batch_size` per process."""
        order = sorted(range(len(self.data)), key=lambda i: self.data.lengths[i])
        width = batch_size * self.world_size
        for start in range(0, len(order), width):
            yield self._share(order[start : start + width], batch_size, micro_steps=1)

    def _share(self, chosen: list[int], micro_batch_size: int, micro_steps: int) -> StepExamples:
        # Examples of like length run together: less padding, and processes that wait less for each other. The order inside a
        # step changes nothing in its sum.
        chosen = sorted(chosen, key=lambda i: self.data.lengths[i])
        width = micro_batch_size * self.world_size
        mine = [chosen[m * width : (m + 1) * width][self.rank :: self.world_size] for m in range(micro_steps)]
        return StepExamples(
            micro_batches=[self.data.collate(indices) for indices in mine],
            examples=len(chosen),
            tokens=sum(self.data.lengths[i] for i in chosen),
            loss_tokens=sum(self.data.loss_tokens[i] for i in chosen),
            indices=chosen,
        )

"""Which examples a step sees, and how they become tensors.

Shapes: B examples of a micro batch, T their padded length, K the positions whose next token the loss counts.
A step's examples follow from (seed, step) alone: every process knows them all, at every world size, without a message.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cola_ds.data.packing import PackedBatch
    from cola_ds.data.sources import TokenizedData
    from cola_ds.data.taskdata import TaskData

IGNORED = -100  # the label that cross-entropy leaves out
PADDING = 0  # any id that every vocabulary has: padding is masked, and never a label


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; nobody waits for the copy but the device's own work that comes after it."""
    # Only from pinned memory does a copy run beside the host; torch keeps that memory until the copy has ended.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass(frozen=True)
class Batch:
    """A micro batch, padded on the right."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T)
    positions: Tensor  # (K,) where some example's next token counts
    labels: Tensor  # (B, K) the next token at each position, or IGNORED

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(*(move(t, device) for t in (self.input_ids, self.attention_mask, self.positions, self.labels)))

    def first(self) -> Batch:
        """Its first example alone."""
        return Batch(self.input_ids[:1], self.attention_mask[:1], self.positions, self.labels[:1])

    def counted(self) -> Tensor:  # ()
        """How much the loss is a sum over: labelled tokens."""
        return (self.labels != IGNORED).sum()


@dataclass(frozen=True)
class StepExamples:
    """The examples of one step, or of one evaluation batch, over all processes."""

    micro_batches: Sequence[Batch | PackedBatch]
    """This process's share; a process that runs out of examples gets a batch that counts nothing."""
    examples: int
    tokens: int
    loss_tokens: int
    """All three over all processes. The loss is the mean over labelled tokens, or over examples where candidates are compared."""
    indices: list[int]
    """The examples' 0-based places in the data, of all processes."""


class Batcher:
    """Batches of a dataset for one process among `world_size`."""

    def __init__(self, data: TokenizedData | TaskData, rank: int, world_size: int):
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


def collate(examples: list[tuple[list[int], int]]) -> Batch:
    """Pad (ids, prompt_length) pairs on the right; positions before the last id of the prompt count nothing."""
    width = max(len(ids) for ids, _ in examples)
    input_ids = torch.full((len(examples), width), PADDING)  # (B, T)
    attention_mask = torch.zeros_like(input_ids)
    next_ids = torch.full_like(input_ids, IGNORED)  # (B, T): the label of each position
    for row, (ids, prompt_length) in enumerate(examples):
        tokens = torch.tensor(ids)
        input_ids[row, : len(ids)] = tokens
        attention_mask[row, : len(ids)] = 1
        first = max(prompt_length, 1)
        next_ids[row, first - 1 : len(ids) - 1] = tokens[first:]
    positions = (next_ids != IGNORED).any(dim=0).nonzero().flatten()
    if not len(positions):
        positions = torch.zeros(1, dtype=torch.long)
    return Batch(input_ids, attention_mask, positions, next_ids[:, positions])

"""Batches: the types that training and evaluation take, and those that they are made from. No logic: see batcher.py, collate.py,
packing.py and candidates.py.

Shapes: B rows of a micro batch, each an example, or a few of them where rows are packed; T their padded length, K the positions
whose next token the loss counts, C the candidates of the example that has most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy
import torch
from torch import Tensor

IGNORED = -100  # the label that cross-entropy leaves out
PADDING = 0  # any id that every vocabulary has: padding is masked, and never a label
SHARED, OUTSIDE = -1, -2  # where a position belongs to no candidate: the shared prompt, and padding


def _move(tensor: Tensor, device: torch.device) -> Tensor:
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
        return Batch(*(_move(getattr(self, field.name), device) for field in fields(self)))

    def first(self) -> Batch:
        """Its first example alone."""
        return Batch(self.input_ids[:1], self.attention_mask[:1], self.positions, self.labels[:1])

    def counted(self) -> Tensor:  # ()
        """How much the loss is a sum over: labelled tokens."""
        return (self.labels != IGNORED).sum()


@dataclass(frozen=True)
class PackedBatch:
    """A micro batch of packed rows: whole examples one after the other, padded on the right.

    Position ids restart with each example, and say so where it begins; padding restarts at every place. No example sees another:
    `evaluation/separation.py` has it proved at the start of a run.
    """

    input_ids: Tensor  # (B, T)
    position_ids: Tensor  # (B, T) from 0 in each example; 0 in padding
    positions: Tensor  # (K,) where some row's next id counts
    labels: Tensor  # (B, K) the next id of the same example at each position, or IGNORED
    cu_seq_lens: Tensor  # (examples + paddings + 1,) int32: where each begins, the rows laid end to end; and B T
    longest: int
    """Positions of the longest of these."""

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on a device."""
        moved = {f.name: _move(getattr(self, f.name), device) for f in fields(self) if f.name != "longest"}
        return PackedBatch(**moved, longest=self.longest)

    def first(self) -> PackedBatch:
        """Its first example alone."""
        length = int(self.cu_seq_lens[1])
        within = self.positions < length
        ids, position_ids = self.input_ids[:1, :length], self.position_ids[:1, :length]
        return PackedBatch(
            ids, position_ids, self.positions[within], self.labels[:1, within], self.cu_seq_lens[:2], length
        )

    def counted(self) -> Tensor:  # ()
        """How much the loss is a sum over: labelled tokens."""
        return (self.labels != IGNORED).sum()

    def attention_mask(self, dtype: torch.dtype) -> Tensor:  # (B, 1, T, T)
        """What attention scores take as a summand: 0 where a query sees a key, the lowest number elsewhere."""
        segments = (torch.diff(self.position_ids, prepend=self.position_ids[:, :1] - 1) != 1).cumsum(-1)
        visible = (segments[:, None, :, None] == segments[:, None, None, :]).tril()
        return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)


@dataclass(frozen=True, kw_only=True)
class CandidateBatch:
    """A micro batch of a task's examples, the candidates of each in one row, padded on the left: where answers have one length,
    their positions agree in all rows."""

    input_ids: Tensor  # (B, T)
    position_ids: Tensor  # (B, T)
    branches: Tensor  # (B, T) the candidate, from 0, that a position belongs to; negative in shared prompt and padding
    positions: Tensor  # (K,) where some row's next id counts
    labels: Tensor  # (B, K) the next id at each position, or IGNORED
    counts: Tensor  # (B, C) ids of each answer; 0 where there is no such candidate
    correct: Tensor  # (B,) the right candidate, or -1

    def to(self, device: torch.device) -> CandidateBatch:
        """The same batch on a device."""
        return CandidateBatch(**{field.name: _move(getattr(self, field.name), device) for field in fields(self)})

    def first(self) -> CandidateBatch:
        """Its first example alone."""
        rows = {field.name: getattr(self, field.name)[:1] for field in fields(self)}
        return CandidateBatch(**{**rows, "positions": self.positions})

    def counted(self) -> Tensor:  # ()
        """How much the loss is a sum over: examples with a right candidate."""
        return (self.real & (self.correct >= 0)).sum()

    @property
    def real(self) -> Tensor:  # (B,)
        """Whether a row is an example; a row that stands for none counts nothing."""
        return self.counts.any(dim=1)

    @property
    def segments(self) -> Tensor:  # (B, K)
        """The candidate that each of `labels` belongs to; negative where there is none."""
        return self.branches[:, self.positions]

    def attention_mask(self, dtype: torch.dtype) -> Tensor:  # (B, 1, T, T)
        """What attention scores take as a summand: 0 where a query sees a key, the lowest number elsewhere.

        Every query sees itself, in padding too: no softmax is over nothing.
        """
        queries, keys = self.branches[:, None, :, None], self.branches[:, None, None, :]
        visible = ((keys == queries) | (keys == SHARED)).tril()
        return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)


@dataclass(frozen=True)
class Encoded:
    """An example of a task as token ids."""

    candidate_ids: list[list[int]]
    """The prompt with each candidate; without candidates, the prompt with the answer alone."""
    answer_lengths: list[int]
    """How many ids at the end of each belong to the answer; at least 1."""
    prompt_ids: list[int]
    """The prompt alone, with room for an answer to be generated."""
    lost: str
    """What the maximum length took from them, as in tokens.py; empty where nothing is lost."""


AnyBatch = Batch | PackedBatch | CandidateBatch


class Dataset(Protocol):
    """Dataset: examples as token ids, as the Batcher needs them. Indices are 0-based."""

    @property
    def lengths(self) -> Sequence[int] | numpy.ndarray:
        """Positions of each example in a batch."""

    @property
    def loss_tokens(self) -> Sequence[int] | numpy.ndarray:
        """What the mean of the training loss counts of each example: labelled tokens, or the example once."""

    @property
    def predictions(self) -> Sequence[int] | numpy.ndarray:
        """Positions of each example whose next id is predicted: where the output head is needed."""

    def __len__(self) -> int: ...

    def collate(self, indices: list[int]) -> AnyBatch:
        """A micro batch of these examples; without any, one that counts nothing."""


class PackableDataset(Dataset, Protocol):
    """Dataset whose examples may share rows."""

    def collate_packed(self, rows: list[list[int]], padded_to: tuple[int, int] | None = None) -> PackedBatch:
        """A micro batch of rows of these examples; without any, one that counts nothing. `padded_to` as in packing.py."""


@dataclass(frozen=True, kw_only=True)
class StepExamples:
    """The examples of one step, or of one evaluation batch, over all processes."""

    micro_batches: Sequence[AnyBatch]
    """This process's share; a process that runs out of rows gets a batch that counts nothing."""
    examples: int
    tokens: int
    loss_tokens: int
    """All three over all processes. The loss is the mean over labelled tokens, or over examples where candidates are compared."""
    predictions: int
    """Positions whose next id is predicted, of all processes."""
    indices: list[int]
    """The examples' 0-based places in the data, of all processes."""
    lengths: list[int]
    """Their tokens, in that order."""
